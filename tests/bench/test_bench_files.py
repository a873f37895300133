"""The benchmark's files: what cannot be written, and what is read that is no result."""

from __future__ import annotations

import json
import os
import stat
import sys

import pytest

from bnorm_ext.bench import __main__ as cli
from bnorm_ext.bench import compare, options, plots, report, train
from tests.common.bench_programs import QUICKLY, refused

pytestmark = pytest.mark.usefixtures("process_as_it_was")


@pytest.mark.parametrize("program", [cli, train])
def test_files_that_cannot_be_written(program, tmp_path, capsys):
    locked = tmp_path / "locked.json"
    locked.write_text("kept")
    locked.chmod(0o444)
    for file, message in (
        (tmp_path, "is a folder"),
        ("", "is a folder"),
        (tmp_path / "no" / "a.json", "no folder"),
        (locked / "a.json", "no folder"),
        (locked, "is read-only"),
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "a\0.json", "null"),
    ):
        line = refused(program, ["--device", "cpu", "--json", file], capsys)
        assert message in line, line
        assert line.split(": ", 1)[1].startswith("--json")
    assert locked.read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["locked.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o555)
    line = refused(cli, ["--device", "cpu", "--json", tmp_path / "locked" / "a.json"], capsys)
    assert "Permission denied" in line


def test_a_folder_that_refuses_is_found_by_trying(tmp_path, monkeypatch):
    """As root on a file system that is mounted read-only, no mode and no access() says so."""

    def touch(self):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(options.Path, "touch", touch)
    with pytest.raises(ValueError, match=r"--json .*a.json: Read-only file system"):
        options.check_output(tmp_path / "a.json", "--json")


def test_what_is_no_file_is_written_and_not_replaced(tmp_path, capfd):
    pipe, link = tmp_path / "pipe", tmp_path / "link.json"
    os.mkfifo(pipe)
    options.check_output(pipe, "--json")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    report.write_json(pipe, {}, [])
    assert json.loads(os.read(reader, 1000)) == {"header": {}, "rows": []}
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    link.symlink_to(tmp_path / "target.json")
    options.check_output(link, "--json")
    report.write_json(link, {}, [])
    assert link.is_symlink()
    assert report.read_json(tmp_path / "target.json") == ({}, [])


def test_pictures(tmp_path, capsys):
    for name, message in (
        ("a.bmp", "the name must end in .png, .svg"),
        ("a", "the name must end in"),
        ("no/a.png", "no folder"),
    ):
        assert message in refused(cli, [*QUICKLY, "--plot", tmp_path / name], capsys)
    both = tmp_path / "a.png"
    assert "same file" in refused(cli, [*QUICKLY, "--plot", both, "--json", both], capsys)


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    """Only what draws needs it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "bnorm_ext.bench.pictures", raising=False)
    line = refused(cli, [*QUICKLY, "--plot", tmp_path / "a.png"], capsys)
    assert "pip install matplotlib" in line
    (tmp_path / "a.json").write_text(json.dumps({"header": {}, "rows": [row()]}))
    line = refused(plots, [tmp_path / "a.json", tmp_path / "a.png"], capsys)
    assert "pip install matplotlib" in line


def row(**fields):
    return {
        "device": "cpu", "cache": "cold", "dtype": "float32", "layout": "contiguous",
        "shape": [4, 3], "op": "bn", "pass": "fwd", "provider": "torch", "median_us": 1.0,
        "p10_us": 1.0, "p90_us": 1.0, "first_half_us": 1.0, "second_half_us": 1.0,
        "copy_fraction": 0.5, "correct": True, "reason": None, "ratio": 1.0, "count": 1,
        "layer": "",
    } | fields  # fmt: skip


NO_RESULTS = {
    "empty": b"",
    "binary": b"\xff\xfe\0",
    "a list": b"[1]",
    "no rows": b"{}",
    "deep": b"[" * 100_000,
    "header": b'{"header": [], "rows": []}',
    "versions": b'{"header": {"versions": 3}, "rows": []}',
    "rows": b'{"header": {}, "rows": {}}',
    "training": b'{"header": {}, "rows": [{"variant": "native", "median_us": 1.0}]}',
    **{
        f"{name} {value}": json.dumps({"header": {}, "rows": [row(**{name: value})]}).encode()
        for name, value in (
            ("median_us", 0), ("median_us", -1.0), ("median_us", float("nan")), ("median_us", "1"),
            ("median_us", None), ("shape", [[4], 3]), ("shape", [3]), ("shape", "4x3"),
            ("dtype", "int8"), ("provider", None), ("ratio", 0), ("correct", "yes"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("content", NO_RESULTS.values(), ids=NO_RESULTS)
def test_what_is_no_result_is_not_compared_and_not_drawn(content, tmp_path, capsys):
    file, picture = tmp_path / "a.json", tmp_path / "a.png"
    file.write_bytes(content)
    for program, arguments in (
        (cli, ["--compare", file, "--device", "cpu"]),
        (cli, ["--compare", file, file]),
        (compare, [file, file]),
        (plots, [file, picture]),
    ):
        line = refused(program, arguments, capsys)
        assert f"{file}: not a file that --json wrote" in line
    assert "Is a directory" in refused(compare, [tmp_path, tmp_path], capsys)
    assert not picture.exists()


def test_results_with_nothing_in_them(tmp_path, capsys):
    file = tmp_path / "a.json"
    file.write_text('{"header": {}, "rows": []}')
    assert compare.main([str(file), str(file)]) == 0
    assert "No case was timed in both." in capsys.readouterr().out
    assert "no rows to draw" in refused(plots, [file, tmp_path / "a.png"], capsys)
    file.write_text(json.dumps({"header": {}, "rows": [row()]}))
    assert "its header has no" in refused(plots, [file, tmp_path / "a.png"], capsys)
