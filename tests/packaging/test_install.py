"""The built extension and its ways into an environment: one OpenMP runtime, no code of the wrong
instruction set, errors at import that name the remedy, and the sdist in a clean environment."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import torch

import bnorm_ext
from bnorm_ext import _load

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(bnorm_ext.__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

pytestmark = pytest.mark.skipif(_load.DISABLED, reason="BNORM_EXT_DISABLE=1: nothing is loaded")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc and ELF files")
x86_only = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set on this machine"
)


def tool(*command: str) -> str:
    """Output of one of the binutils."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def python(code: str, folder: Path, executable: str = sys.executable, **environ: str):
    """Runs code in a process that finds `folder` before anything that is installed."""
    # An editable install would fill in the modules that a copy in `folder` lacks.
    own_finders = "[f for f in sys.meta_path if 'Editable' not in repr(f)]"
    code = f"import sys; sys.meta_path = {own_finders}\n{code}"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BNORM_EXT_", "PYTHON"))}
    return subprocess.run(
        [executable, "-c", code],
        cwd=folder,
        env={**clean, "PYTHONPATH": str(folder), **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build_info_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- the compiled module --------------------------------------------------------------------------


def test_build_info():
    info = bnorm_ext.build_info()
    assert info["version"] == bnorm_ext.__version__
    assert info["torch"] == torch.__version__
    assert info["compiler"]
    assert info["cpu_capability"] in info["cpu_isas"]
    assert info["cuda_kernels"] == (info["cuda"] is not None) == (info["cuda_left_out"] is None)
    assert bool(info["archs"]) == info["cuda_kernels"] == (info["archs_from"] is not None)


@linux_only
def test_one_openmp_runtime_and_threads_through_it():
    library = str(PACKAGE / f"_C{SUFFIX}")
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "-d", library))
    assert needed
    assert not [name for name in needed if re.match(r"lib(gomp|omp|iomp)", name)]
    if "clang" in str(bnorm_ext.build_info()["compiler"]).lower():
        pytest.skip("a build by Clang may have no threads: test_build.py")
    # Without -fopenmp the kernels would use one thread, and say nothing.
    assert re.search(r" U (GOMP_parallel|__kmpc_fork_call)", tool("nm", "-D", library))

    code = """
import re, bnorm_ext, torch
x = torch.randn(64, 32, 32, 32)
bnorm_ext.batch_norm(x, None, None, training=True)
torch.nn.functional.batch_norm(x, None, None, training=True)
maps = open("/proc/self/maps").read()
print(*sorted(set(re.findall(r"/\\S*/lib(?:gomp|omp|iomp)[^/\\s]*", maps))))
"""
    runtimes = build_info_of(python(code, PACKAGE.parent)).split()
    assert len(runtimes) == 1, runtimes


def kernel_object(isa: str) -> str:
    """The object that the build of this torch left in the source tree."""
    folder = ROOT / "build" / f"temp-{sys.implementation.cache_tag}-torch-{torch.__version__}"
    path = folder / f"kernels_{isa}.o"
    if not path.exists():
        pytest.skip(f"{path.name} is not in the source tree: compiled elsewhere")
    return str(path)


@x86_only
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_isa_objects_share_no_code(isa):
    """A weak symbol could be the one that the linker keeps for everybody: an inline function,
    compiled for AVX-512, would then crash older processors that never chose the AVX-512 kernels."""
    symbols = re.findall(r"^\S* +([A-Za-z]) (\S+)$", tool("nm", kernel_object(isa)), re.MULTILINE)
    assert symbols
    assert [name for kind, name in symbols if kind in "VWu"] == []


@x86_only
@pytest.mark.parametrize(("isa", "has"), [("baseline", ""), ("avx2", "vy"), ("avx512", "vyzk")])
def test_isa_objects_use_their_own_instructions(isa, has):
    """Wider registers, masks, and the encoding that came with AVX (mnemonics in v)."""
    code = tool("objdump", "-d", "--no-show-raw-insn", kernel_object(isa))
    found = {
        "v": re.search(r"^\s*[0-9a-f]+:\s+v", code, re.MULTILINE),
        "y": "%ymm" in code,
        "z": "%zmm" in code or re.search(r"%[xy]mm(1[6-9]|2[0-9]|3[01])\b", code),
        "k": re.search(r"%k[0-7]", code),
    }
    assert "%xmm" in code
    assert [kind for kind, seen in found.items() if seen] == list(has)


# --- errors at import -----------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package, without the compiled module."""
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "bnorm_ext", ignore=ignore)
    return tmp_path


def test_another_torch_is_an_error_before_anything_is_loaded(copy):
    record = copy / "bnorm_ext" / "_build.py"
    record.write_text(record.read_text().replace(repr(str(torch.__version__)), "'2.8.9+other'"))
    (copy / "bnorm_ext" / f"_C{SUFFIX}").write_text("not a library: loading it would fail")
    done = python("import bnorm_ext", copy)
    assert done.returncode != 0
    assert "ImportError: bnorm_ext was compiled against torch 2.8.9+other" in done.stderr
    assert f"but torch {torch.__version__}" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


@pytest.mark.parametrize("missing", ["_build.py", "_C"])
def test_a_source_tree_that_was_not_compiled(copy, missing):
    (copy / "bnorm_ext" / missing).unlink(missing_ok=True)
    done = python("import bnorm_ext", copy)
    assert done.returncode != 0
    assert f"ImportError: bnorm_ext is not compiled for this Python: {missing}" in done.stderr
    assert "pip install --no-build-isolation ." in done.stderr


@pytest.mark.parametrize("missing", ["_build.py", "_C"])
def test_disabled_needs_no_compiled_module(copy, missing):
    (copy / "bnorm_ext" / missing).unlink(missing_ok=True)
    code = "import bnorm_ext; i = bnorm_ext.build_info(); print(i['torch'], i['cpu_capability'])"
    done = python(code, copy, BNORM_EXT_DISABLE="1")
    torch_built = None if missing == "_build.py" else torch.__version__
    assert build_info_of(done) == f"{torch_built} None"


# --- sdist and clean environments -----------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a copy of the source tree, by a Python that sees no torch."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    folder = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(".git", ".venv*", "build", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, folder / "tree", ignore=ignore)
    (folder / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(folder)],
        cwd=folder / "tree",
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=True,
    )
    (made,) = folder.glob("*.tar.gz")
    return made


def test_sdist_has_every_source_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder in ("csrc", "cuda_emulator", "tests"):
        files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"]
        assert {p.relative_to(ROOT).as_posix() for p in files} <= names
    assert {"setup.py", "build_cuda.py", "build_support.py", "pyproject.toml"} <= names
    assert {"LICENSE", "README.md"} <= names
    assert {f"bnorm_ext/{p.name}" for p in PACKAGE.glob("[!_]*.py")} <= names
    assert not [n for n in names if n.endswith((".so", ".o", ".pyc", "bnorm_ext/_build.py"))]


@pytest.fixture(scope="module")
def clean_venv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Python of a new environment that sees torch and the build tools of this one, by the last
    entry of sys.path: the .pth file of an editable bnorm_ext has no effect there."""
    folder = tmp_path_factory.mktemp("venv")
    try:
        venv.create(folder, with_pip=True, symlinks=True)
    except subprocess.CalledProcessError:
        pytest.skip("this Python has no ensurepip")
    (site,) = folder.glob("lib/python3*/site-packages")
    parents = {str(Path(torch.__file__).parents[1]), *map(str, map(Path, sys.path[1:]))}
    packages = sorted(path for path in parents if path.endswith("-packages"))
    (site / "parent.pth").write_text("\n".join(packages))
    executable = str(folder / "bin" / "python")
    # Older Pythons put an old setuptools into a new environment, before that of the parent.
    uninstall = [executable, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"]
    subprocess.run(uninstall, check=True)
    return executable


def pip_install(executable: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # Nothing here is about CUDA, whose kernels take many minutes beside an nvcc.
    clean["BNORM_EXT_CUDA"] = "0"
    command = [executable, "-m", "pip", "install", *arguments]
    return subprocess.run(command, env=clean, capture_output=True, text=True, timeout=1500)


@pytest.mark.slow
def test_isolated_build_without_torch_names_the_command(clean_venv, sdist):
    done = pip_install(clean_venv, str(sdist))
    output = done.stdout + done.stderr
    if "setuptools" in output and "No matching distribution found" in output:
        pytest.skip("pip cannot fetch setuptools here, which an isolated build starts with")
    assert done.returncode != 0
    assert "pip install --no-build-isolation ." in output
    assert "No module named" not in output


@pytest.fixture(scope="module")
def installed(clean_venv: str, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same Python, with bnorm_ext built from the sdist."""
    missing = python("import bnorm_ext", tmp_path_factory.mktemp("empty"), clean_venv)
    assert "No module named 'bnorm_ext'" in missing.stderr, "the environment is not clean"

    done = pip_install(clean_venv, "--verbose", "--no-build-isolation", "--no-index", str(sdist))
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = re.findall(r"bnorm_ext: torch .*CUDA kernels: .+", done.stdout + done.stderr)[:1]
    assert torch.__version__ in line
    return clean_venv


@pytest.mark.slow
def test_sdist_in_a_clean_environment(installed, tmp_path):
    shutil.copy(ROOT / ".ci" / "check_install.py", tmp_path / "check_install.py")
    code = "import check_install as c; c.main(); import bnorm_ext; print(bnorm_ext.__file__)"
    found = build_info_of(python(code, tmp_path, installed)).splitlines()[-1]
    assert found.startswith(str(Path(installed).parents[1]))


@pytest.mark.slow
def test_the_benchmarks_of_an_installed_package(installed, sdist, tmp_path):
    """`bnorm-bench` from anywhere, and `python -m bench` in the checkout that it was installed
    from, whose source folder would hide the installed package."""
    checkout, script = sdist.parent / "tree", str(Path(installed).parent / "bnorm-bench")
    assert not list(checkout.glob("bnorm_ext/_C.*"))
    quickly = ["--shape", "4,3,5,6", "--device", "cpu", "--threads", "1"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BNORM_EXT_", "PYTHON"))}
    for folder in (tmp_path, checkout):
        ways = [[script], *([[installed, "-m", "bench"]] if folder == checkout else [])]
        for way in ways:
            for arguments, printed in (
                ([*quickly, "--time-budget", "0.01"], "geometric mean, torch / provider"),
                (["profile", *quickly], "bnorm_ext::batch_norm_training"),
                (["train", "--help"], "usage: "),
            ):
                done = subprocess.run(
                    [*way, *arguments], cwd=folder, env=clean, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stderr
                assert printed in done.stdout
