"""`make docs`: the API reference is written, and every public name with its signature is in it."""

from __future__ import annotations

import html
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bnorm_ext

pytest.importorskip("pdoc", reason="the API reference is written by pdoc")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "api_reference.py"), str(folder)],
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "bnorm_ext.html").read_text(encoding="utf-8")


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def test_every_public_name_is_on_the_page(page):
    names = [name for name in bnorm_ext.__all__ if not name.startswith("_")]
    assert len(names) > 10
    for name in names:
        assert f'id="{name}"' in page, name


def test_signatures_are_those_of_the_code(page):
    """Of constructors too, which pdoc leaves out if they are inherited."""
    text = words(page)
    for name in bnorm_ext.__all__:
        value = getattr(bnorm_ext, name)
        if inspect.isfunction(value):
            for parameter in inspect.signature(value).parameters.values():
                assert f"{parameter.name}:" in text, f"{name}({parameter.name})"
        elif inspect.isclass(value):
            first, second, *_ = inspect.signature(value).parameters
            assert re.search(rf"{name}\(\s*{first}[:=][^()]+, {second}[:=]", text), name


def test_comments_of_fields_are_shown(page):
    assert "Name of the batch norm" in words(page)


def test_docstrings_are_rendered(page):
    """Sections become headings, and no reStructuredText is left over."""
    text = words(page)
    assert inspect.getdoc(bnorm_ext.batch_norm)
    assert "cumulative average" in text
    assert re.search(r"<h6[^>]*>Arguments:</h6>|<h6[^>]*>Args:</h6>", page)
    assert ":class:`" not in text
    assert ":func:`" not in text


def test_it_opens_as_plain_files(folder, page):
    """Without a server and without the network: nothing is loaded from elsewhere."""
    assert (folder / "index.html").exists()
    assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', page)
