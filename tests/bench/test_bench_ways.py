"""Ways to the benchmark programs: `python -m bench` in a checkout, compiled or not, beside an
installed package. With an installation made by pip: test_install.py."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bnorm_ext
from bnorm_ext import _load
from bnorm_ext.bench import cases, options, packages

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(bnorm_ext.__file__).resolve().parent

pytestmark = [
    pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="needs the source tree"),
    pytest.mark.skipif(_load.DISABLED, reason="BNORM_EXT_DISABLE=1: nothing is loaded"),
]
QUICKLY = ["--shape", "4,3,5,6", "--provider", "bnorm_ext,torch", "--time-budget", "0.01",
           "--device", "cpu", "--threads", "1"]  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A source folder that is not compiled."""
    folder = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("_C.*", "_build.py", "__pycache__", "results")
    shutil.copytree(ROOT / "bench", folder / "bench", ignore=ignored)
    shutil.copytree(PACKAGE, folder / "bnorm_ext", ignore=ignored)
    return folder


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder like site-packages, with the compiled package."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "installed" / "bnorm_ext", ignore=ignored)
    return tmp_path / "installed"


def run(
    folder: Path, module: str, *arguments: str, path: Path | None = None, **environ: str
) -> subprocess.CompletedProcess[str]:
    """`python -m module` in that folder."""
    # An editable install of another checkout would be found where `installed` is not asked for.
    code = (
        "import runpy, sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        f"sys.path[0] = {str(folder)!r}\n"
        f"sys.argv = {[module, *arguments]}\n"
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BNORM_EXT_", "PYTHON"))}
    found = {"PYTHONPATH": str(path)} if path else {}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**clean, **found, **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_recorded_is_asked_for_in_options_that_there_are(device):
    """Each command of `bench/record.sh`, up to where it would measure."""
    script = ROOT / "bench" / "record.sh"
    done = subprocess.run(
        [script, sys.executable, device],
        env={**os.environ, "RECORD_DRY": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    commands = [line.split() for line in done.stdout.splitlines()]
    files = [c[c.index("--json") + 1] for c in commands if "--json" in c]
    assert len(set(files)) == len(files) >= len(commands) - 1
    for program, *arguments in commands:
        module = importlib.import_module(f"bnorm_ext.bench.{program.partition('.')[2] or 'micro'}")
        parsed = module.parser(program).parse_args(arguments)
        assert parsed.device == device
        if program == "bench":  # Providers and suites are looked up later.
            options.names(parsed.provider, "--provider", packages.NAMES)
            assert parsed.suite in (None, *cases.SUITES)


def test_a_measurement_that_there_is_not_is_named():
    command = [ROOT / "bench" / "record.sh", sys.executable, "cpu", "quikc"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "record.sh: no measurement is named quikc"


@pytest.mark.parametrize(
    ("module", "arguments", "printed"),
    [
        ("bench", QUICKLY, "geometric mean, torch / provider"),
        ("bench", ["train", "--help"], "usage: python -m bench train "),
        ("bench.train", ["--help"], "usage: python -m bench.train "),
        ("bench.profile", ["--shape", "2,3,4,4", "--device", "cpu"], "bnorm_ext::batch_norm_train"),
        ("bench.sync", ["--traffic"], "53 batch norms"),
        ("bench.cost_model", ["--bandwidth", "4e12", "--net", "resnet18", "--sums"], "resnet18"),
        ("bench.compare", ["--help"], "usage: python -m bench.compare "),
        ("bench.plots", ["--help"], "usage: python -m bench.plots "),
        ("bench.numerics", ["--cases", "5"], "the promise holds in every case"),
    ],
)
def test_a_checkout_that_is_not_compiled_measures_what_is_installed(
    checkout, installed, module, arguments, printed
):
    done = run(checkout, module, *arguments, path=installed)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    if module == "bench" and arguments is QUICKLY:
        title = " ".join(done.stdout.split())
        assert "as installed" in title
        assert "python -m bench --shape 4,3,5,6" in title


def test_a_checkout_that_was_compiled_for_another_torch_measures_what_is_installed(
    checkout, installed
):
    (checkout / "bnorm_ext" / "_build.py").write_text("TORCH = '1.0'\n")
    done = run(checkout, "bench", *QUICKLY, path=installed)
    assert done.returncode == 0, done.stderr
    assert "as installed" in " ".join(done.stdout.split())


def test_a_checkout_that_is_compiled_measures_itself(checkout, installed):
    for file in [*PACKAGE.glob("_C.*"), PACKAGE / "_build.py"]:
        shutil.copy(file, checkout / "bnorm_ext")
    (installed / "bnorm_ext" / "__init__.py").write_text("raise RuntimeError('installed')")
    done = run(checkout, "bench", *QUICKLY, path=installed)
    assert done.returncode == 0, done.stderr


def test_with_nothing_compiled_anywhere_the_error_says_what_to_do(checkout):
    done = run(checkout, "bench")
    assert done.returncode != 0
    last = done.stderr[done.stderr.rindex("\nImportError: ") :]
    assert "bnorm_ext is not compiled for this Python" in last
    assert "pip install --no-build-isolation ." in last


def test_an_installed_package_that_does_not_fit_says_so_itself(checkout, installed):
    (installed / "bnorm_ext" / "_build.py").write_text("TORCH = '1.0'\n")
    done = run(checkout, "bench", path=installed)
    assert "ImportError: bnorm_ext was compiled against torch 1.0" in done.stderr


def test_the_commit_is_that_of_what_is_measured(tmp_path, monkeypatch):
    """Not of a checkout that happens to contain the environment."""
    from bnorm_ext.bench import machine

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    inside = tmp_path / ".venv" / "site-packages"
    inside.mkdir(parents=True)
    subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    commit = [*git, "commit", "-q", "--allow-empty", "-m", "one"]
    subprocess.run(commit, cwd=tmp_path, check=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path.resolve())
    head = machine.commit()
    assert head
    assert " " not in head
    files = {folder: tmp_path / folder / "file" for folder in ("bench/results", "csrc")}
    for file in files.values():
        file.parent.mkdir(parents=True)
        file.write_text("before")
    subprocess.run([*git, "add", "bench", "csrc"], cwd=tmp_path, check=True)
    subprocess.run(commit, cwd=tmp_path, check=True)
    files["bench/results"].write_text("a new result")
    assert "with changes" not in machine.commit()
    files["csrc"].write_text("a new kernel")
    assert machine.commit().endswith(", with changes")
    monkeypatch.setattr(machine, "ROOT", inside.resolve())
    assert machine.commit() is None
