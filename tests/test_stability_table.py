"""Tables of subnetworks' losses: round trips, summaries, concatenation."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from modeconn.errors import ModeconnError
from modeconn.stability.table import COLUMNS, Level, Row, StabilityTable

ORIGINAL = Level(0.001, 0.0, 0.2, 0.03)


def table(entries: int = 3, draws: int = 4) -> StabilityTable:
    rows = [
        Row(
            entry,
            draw,
            0.1 * entry + 0.01 * abs(draw - 1),
            0.1,
            0.5,
            0.2,
            "dropout",
            1.5,
            1.1 + draw,
        )
        for entry in range(entries)
        for draw in range(draws)
    ]
    return StabilityTable(rows, ORIGINAL)


def test_summary() -> None:
    first, second, _ = table().summary()
    assert (first.entry, first.draws, first.best.draw) == (0, 4, 1)
    assert second.mean.train_loss == pytest.approx(0.1 + (0.01 + 0 + 0.01 + 0.02) / 4)
    assert second.std.train_loss == pytest.approx(
        math.sqrt(sum((x - 0.01) ** 2 for x in (0.01, 0, 0.01, 0.02)) / 4)
    )
    assert second.std.test_error == 0


def test_best_draw_is_a_finite_one() -> None:
    rows = [Row(0, 0, math.nan, 1.0), Row(0, 1, math.inf, 1.0), Row(0, 2, 3.0, 0.5)]
    (summary,) = StabilityTable(rows, ORIGINAL).summary()
    assert summary.best.draw == 2


numbers = st.floats()


@pytest.mark.parametrize("suffix", [".csv", ".json", ".CSV"])
@given(
    values=st.lists(
        st.tuples(*[numbers] * 6, st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)),
        max_size=4,
    ),
    own=st.tuples(*[numbers] * 4),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, values: list, own: tuple
) -> None:
    rows = [
        Row(i // 2, i % 2, *v[:4], method=v[6].replace("\r", ""), seconds=v[4], scale=v[5])
        for i, v in enumerate(values)
    ]
    before = StabilityTable(rows, Level(*own))
    file = tmp_path_factory.getbasetemp() / f"table{suffix}"
    before.save(file)
    after = StabilityTable.load(file)
    assert before == after
    assert [type(v) for row in after.rows for v in dataclasses.astuple(row)] == [
        type(v) for row in before.rows for v in dataclasses.astuple(row)
    ]


def test_equality() -> None:
    assert table() == table()
    rows = [*table().rows]
    rows[3] = dataclasses.replace(rows[3], scale=math.nan)
    assert table() != StabilityTable(rows, ORIGINAL)
    assert table() != StabilityTable(
        table().rows, dataclasses.replace(ORIGINAL, test_loss=math.nan)
    )
    assert table() != "a table"


def test_concatenation_is_the_whole() -> None:
    whole = table()
    parts = [
        StabilityTable(reversed([row for row in whole.rows if row.entry % 2 == i]), ORIGINAL)
        for i in (1, 0)
    ]
    assert parts[0] + parts[1] == whole
    with pytest.raises(ModeconnError, match="entry layer 1, draw 0 is there twice"):
        parts[0] + whole
    with pytest.raises(
        ModeconnError, match=r"the original's test_loss is 0\.2 in one and nan in the other"
    ):
        parts[0] + StabilityTable(parts[1].rows, Level(0.001, 0.0))


def test_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = table().to_frame()
    assert list(frame.columns) == list(COLUMNS) and len(frame) == 12
    assert frame.groupby("entry").train_loss.mean().tolist() == pytest.approx(
        [s.mean.train_loss for s in table().summary()]
    )
    assert frame.attrs["original"]["train_loss"] == 0.001
    assert isinstance(StabilityTable([], ORIGINAL).to_frame(), pandas.DataFrame)


def test_text() -> None:
    lines = str(table()).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[0].split()[:2] == ["entry", "draws"] and "test error best" in lines[0]
    assert (
        lines[1].split()
        == "0 4 0.01 0.007071 0 10.00 0.00 10.00 0.5 0 0.5 20.00 0.00 20.00".split()
    )
    assert lines[4].split() == "original 0.001 0.00 0.2 3.00".split()
    untested = StabilityTable([Row(0, 0, 0.1, 0.2)], Level(0.1, 0.2))
    assert "test" not in str(untested)
    assert "original" in str(StabilityTable([], ORIGINAL))


def test_column() -> None:
    assert table().column("scale", 1).tolist() == [1.1, 2.1, 3.1, 4.1]
    with pytest.raises(ModeconnError, match="column 'sclae' is unknown"):
        table().column("sclae")
    with pytest.raises(
        ModeconnError, match=r"entry layer 7 is not in the table, which has \[0, 1, 2\]"
    ):
        table().column("scale", 7)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ModeconnError, match=r"saved as \.csv or \.json, not as \.txt"):
        table().save(tmp_path / "table.txt")
    with pytest.raises(ModeconnError, match="no such file"):
        StabilityTable.load(tmp_path / "none.json")
    for name, text in (
        ("a.json", "{}"),
        ("b.json", "["),
        ("c.csv", "a,b\n"),
        ("d.csv", ""),
        ("e.csv", ",".join(COLUMNS)),
        ("f.json", '{"format": "modeconn.PathResult/1"}'),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ModeconnError, match="not a table saved by modeconn"):
            StabilityTable.load(tmp_path / name)
    assert not list(tmp_path.glob("*.tmp"))
