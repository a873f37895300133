"""`python -m bench.numerics`: the table of the accuracy promise, and that in docs/numerics.md."""

from __future__ import annotations

from pathlib import Path

import pytest

import bnorm_ext
from bnorm_ext.bench import numerics
from tests.common.cases import threads

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with threads(1):
        yield


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table in it that has a column `beside`; its head is the first row."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").replace("\\|", "!").split("|")]
        if not inside and "beside" in cells:
            found.append([])
            inside = True
        if inside and not set(line) <= set("|-:"):
            found[-1].append(cells)
    return found


def assert_kept(table: list[list[str]]) -> None:
    head, *rows = table
    for row in rows:
        for name in ("beside", "alone"):
            share = row[head.index(name)]
            assert share == "-" or 0 <= float(share) <= 1, row


def groups(table: list[list[str]]) -> list[list[str]]:
    head, *rows = table
    return [row[: head.index("cases")] for row in rows]


def test_quick_mode_shows_that_the_promise_holds(capsys) -> None:
    code = numerics.main(["--quick", "--seed", "1"])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "the promise holds in every case" in text
    by_dtype, by_layout = tables(text)
    assert len(by_dtype) > 30
    assert len(by_layout) == 1 + 2 * 6
    for table in (by_dtype, by_layout):
        assert_kept(table)
    errors = [cell.split(" / ") for cell in by_dtype[1][4:8]]
    assert all(float(ours) > 0 and float(native) > 0 for ours, native in errors)


def test_the_document_has_these_tables(capsys) -> None:
    """Of all cases: with the same groups, and every share within the promise."""
    numerics.main(["--quick"])
    printed, written = tables(capsys.readouterr().out), tables(DOCUMENT.read_text())
    assert [table[0] for table in written] == [table[0] for table in printed]
    assert [groups(table) for table in written] == [groups(table) for table in printed]
    for table in written:
        assert_kept(table)


@pytest.mark.parametrize(
    ("name", "wrong"), [("y", lambda t: t * (1 + 2**-18)), ("dbias", lambda t: t + 0.01)]
)
def test_a_result_that_is_too_far_off_is_shown(name, wrong, monkeypatch, capsys) -> None:
    right = numerics.run

    def run(function, case, e):
        results = right(function, case, e)
        if function is numerics.ours and name in results:
            results[name] = wrong(results[name])
        return results

    monkeypatch.setattr(numerics, "run", run)
    assert numerics.main(["--cases", "20", "--dtype", "float32"]) == 1
    text = capsys.readouterr().out
    assert f": {name} " in next(line for line in text.splitlines() if line.startswith("BROKEN: "))
    assert "results break the promise" in text


def test_a_case_is_the_same_every_time() -> None:
    for i in range(40):
        d = numerics.draw(3, i, ["float32", "bfloat16"], numerics.COUNTS)
        assert d == numerics.draw(3, i, ["float32", "bfloat16"], numerics.COUNTS)
        (one, e), (other, _) = (numerics.made(d, 3) for _ in range(2))
        assert one.x.equal(other.x)
        assert one.dy.equal(other.dy)
        assert one.x.shape == d.shape
        count = one.x.numel() // one.x.shape[1]
        assert d.counts[0] <= count <= d.counts[1]
        assert (e.residual is not None) == d.residual


def test_options_that_are_wrong(monkeypatch, capsys) -> None:
    for arguments, message in (
        (["--cases", "0"], "at least 1"),
        (["--dtype", "int8"], "--dtype: unknown 'int8'"),
        (["--device", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit) as ended:
            numerics.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(bnorm_ext, "build_info", lambda: {"cpu_capability": None})
    with pytest.raises(SystemExit):
        numerics.main([])
    assert "BNORM_EXT_DISABLE" in capsys.readouterr().err
