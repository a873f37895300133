"""A build that is interrupted leaves nothing behind that the next one takes for good.

The compiler is a script that writes a word for each output, and stops half-way where a test says
so, as a linker that is killed does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.common.build_tools import ROOT, support

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
COMPILER = """#!/bin/sh
before= out= deps= shared=
for word in "$@"; do
    case "$before" in
    -o) out=$word ;;
    -MF) deps=$word ;;
    esac
    case "$word" in
    --version) echo "script 1.0"; exit ;;
    -shared) shared=yes ;;
    esac
    before=$word
done
test -n "$deps" && echo "$out:" >"$deps"
echo half >"$out"
if test -n "$shared" && test -e "$STOP"; then
    touch "$STOP.reached"
    sleep 120
fi
echo whole >"$out"
"""


def interruptible() -> None:
    """In a child: shells have what they start in the background ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Tree:
    """A copy of the source tree, and the script in place of the compiler."""

    def __init__(self, folder: Path, *, has_ninja: bool) -> None:
        self.root, self.stop = folder / "tree", folder / "stop"
        ignore = shutil.ignore_patterns("_C.*", "_build.py", "__pycache__")
        for name in ("csrc", "bnorm_ext"):
            shutil.copytree(ROOT / name, self.root / name, ignore=ignore)
        for file in ("setup.py", "build_support.py", "build_cuda.py", "pyproject.toml"):
            shutil.copy(ROOT / file, self.root)
        for file in ("README.md", "LICENSE"):
            (self.root / file).touch()
        compiler = folder / "g++"
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        self.environment = os.environ | {
            "CXX": str(compiler),
            "STOP": str(self.stop),
            "BNORM_EXT_CUDA": "0",
            "TORCH_DONT_CHECK_COMPILER_ABI": "1",
        }
        if not has_ninja:
            # Torch looks for the program, setup.py for the module.
            (folder / "programs").mkdir()
            for name in ("sh", "touch", "sleep"):
                (folder / "programs" / name).symlink_to(str(shutil.which(name)))
            (folder / "sitecustomize.py").write_text("import sys; sys.modules['ninja'] = None")
            self.environment |= {"PATH": str(folder / "programs"), "PYTHONPATH": str(folder)}
        self.module = self.root / "bnorm_ext" / f"_C{SUFFIX}"
        self.record = self.root / "bnorm_ext" / "_build.py"

    def build(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=interruptible,
        )

    def build_to_the_end(self) -> None:
        process = self.build()
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    def interrupt(self, number: signal.Signals) -> None:
        """Sends the signal to the build and all its children, while it links."""
        self.stop.touch()
        process = self.build()
        reached = self.stop.with_suffix(".reached")
        while not reached.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        os.killpg(process.pid, number)
        process.communicate(timeout=300)
        assert process.returncode != 0
        for file in (self.stop, reached):
            file.unlink()


# With ninja torch links again each time, without it only what is older than its sources.
WAYS = pytest.mark.parametrize("has_ninja", [True, False], ids=["ninja", "no ninja"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
@WAYS
def test_a_build_after_one_that_was_interrupted_while_linking(tmp_path, number, has_ninja):
    tree = Tree(tmp_path, has_ninja=has_ninja)
    tree.interrupt(number)
    assert not tree.module.exists()
    assert not tree.record.exists()
    tree.build_to_the_end()
    assert tree.module.read_text() == "whole\n"
    assert "TORCH = " in tree.record.read_text()


@WAYS
def test_what_was_left_half_copied_is_copied_again(tmp_path, has_ninja):
    """Newer than what it was copied from."""
    tree = Tree(tmp_path, has_ninja=has_ninja)
    tree.build_to_the_end()
    source = tree.root / "csrc" / "bindings.cpp"
    source.write_text(source.read_text() + "// changed\n")
    tree.interrupt(signal.SIGKILL)
    tree.module.write_text("half\n")
    tree.build_to_the_end()
    assert tree.module.read_text() == "whole\n"


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "_build.py"
    support.replace_text(path, "old")

    def full(self, text):
        with self.open("w") as file:
            file.write(text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        support.replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
