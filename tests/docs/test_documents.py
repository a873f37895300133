"""What the documents name is there: files, links, headings, tests, make targets, variables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "bench/NOTES.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
SUFFIXES = (
    *("py", "h", "cuh", "cu", "cpp", "inc", "patch"),
    *("md", "sh", "txt", "json", "png", "toml", "yml", "yaml", "in"),
)
# Written by a command of the document, or the reader's own.
WRITTEN = ("build/", ".venv", "dist/", "/", "new.json", "new.png", "old.json")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@cache
def repository() -> tuple[frozenset[str], frozenset[str]]:
    """Names of the folders at the top; and of everything below them, and the files beside them."""
    skipped = (".git", "build", "dist", ".venv", "__pycache__")
    folders = [p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(skipped)]
    folders += [ROOT / ".github"] if (ROOT / ".github").is_dir() else []
    names = {p.name for folder in folders for p in folder.rglob("*")}
    names |= {p.name for p in ROOT.iterdir() if p.is_file()}
    return frozenset(p.name for p in folders), frozenset(names)


def code_of(text: str) -> Iterator[tuple[str, bool]]:
    """Words of code, and whether they stand in a fenced block."""
    for fence in FENCE.findall(text):
        for word in re.findall(r"[\w./*:{},-]+", fence):
            yield word, True
    for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
        for word in span.split():
            yield word, False


def paths_in(text: str) -> set[str]:
    """Paths of this repository that a text names, without `:line` and `::test`."""
    folders, _ = repository()
    found = set()
    for word, is_fenced in code_of(text):
        path = word.split(":")[0].rstrip(".,;")
        if not re.fullmatch(r"[\w.*{},-]+(/[\w.*{},-]*)*", path) or path.startswith(WRITTEN):
            continue
        is_below = "/" in path and path.split("/")[0] in folders
        is_file = path.rpartition(".")[2] in SUFFIXES and "." in path.strip(".")
        if is_below or (not is_fenced and (is_file or path.endswith("/"))):
            found.add(path)
    return found


def exists(path: str) -> bool:
    alternatives = [path]
    if braces := re.search(r"\{([^}]*)\}", path):
        alternatives = [path.replace(braces[0], part) for part in braces[1].split(",")]
    for one in alternatives:
        one = one.rstrip("/")
        if "/" not in one and one in repository()[1]:
            continue
        if not any(ROOT.glob(one)):
            return False
    return True


def test_paths_are_recognised():
    text = (
        "`csrc/params.h` and `convert.py`, `tests/x.py::test_y`, `a/b` dtypes, `csrc/cpu/`\n"
        "```\npython bench/gone.py new.json 8,16\n```\n"
    )
    assert paths_in(text) == {
        "csrc/params.h",
        "convert.py",
        "tests/x.py",
        "csrc/cpu/",
        "bench/gone.py",
    }
    assert exists("csrc/params.h")
    assert exists("convert.py")
    assert exists("csrc/cpu/")
    assert exists("csrc/*.h")
    assert not exists("bench/gone.py")
    assert not exists("csrc/gone/")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    gone = sorted(path for path in paths_in(text_of(document)) if not exists(path))
    assert not gone, f"{document} names what is not there: {', '.join(gone)}"


def anchor(heading: str) -> str:
    """As GitHub makes it from a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(document))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, section = target.partition("#")
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target}"
        if section:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in map(anchor, headings), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_that_are_named_exist(document):
    for name, test in re.findall(r"([\w/]+\.py)::(test_\w+\*?)", text_of(document)):
        files = [ROOT / name] if "/" in name else list((ROOT / "tests").rglob(name))
        assert files, f"{document}: {name}"
        pattern = rf"^def {test.rstrip('*')}" + ("" if test.endswith("*") else r"\(")
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        assert re.search(pattern, source, re.MULTILINE), f"{document}: {name}::{test}"


def test_functions_are_in_the_file_that_is_named_before_them():
    """Of the page that follows one call: `csrc/autograd.cpp`, `training` and the like."""
    text = text_of("docs/reading.md")
    pairs = re.findall(r"`([\w/.]+\.(?:py|h|cpp|cuh|cu))`, `([A-Za-z_:]+)`", text)
    assert len(pairs) > 10
    for path, name in pairs:
        source = text_of(path)
        for part in name.split("::"):
            assert re.search(rf"\b{part}\b", source), f"reading.md: {name} is not in {path}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_make_targets_exist(document):
    targets = set(re.findall(r"^([a-z][a-z-]*):", text_of("Makefile"), re.MULTILINE))
    text = text_of(document)
    code = "\n".join(FENCE.findall(text) + re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", code):
        assert target in targets, f"{document}: make {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_environment_variables_are_read_somewhere(document):
    names = ("setup.py", "build_cuda.py", "build_support.py", "Makefile")
    sources = [ROOT / name for name in names]
    for folder in ("bnorm_ext", "csrc", "tests", ".ci", "cuda_emulator"):
        sources += [
            path
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") or path.parent.name == ".ci"
        ]
    code = "\n".join(p.read_text(encoding="utf-8") for p in sources if p.is_file())
    for name in set(re.findall(r"\bBNORM_EXT_[A-Z_]+\b", text_of(document))):
        assert re.search(rf"\b{name}\b", code), f"{document}: {name}"
