"""Tables of stability experiments: loss and error per entry layer and draw."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.files.writing import atomic_write
from modeconn.parameters import ranking

if TYPE_CHECKING:
    import pandas

FORMAT = "modeconn.StabilityTable/1"
SUFFIXES = (".csv", ".json")
MEASURES = ("train_loss", "train_error", "test_loss", "test_error")
# The name that a file gives to the row of the network itself, without entry layer or draw.
_ORIGINAL = "original"


@dataclass(frozen=True)
class Level:
    """Losses and errors of a network: means per sample and fractions; NaN without test data."""

    train_loss: float
    train_error: float
    test_loss: float = math.nan
    test_error: float = math.nan


@dataclass(frozen=True)
class Row:
    """One subnetwork.

    Attributes:
        entry, draw: entry layer l and number of the draw, from 0.
        train_loss, train_error, test_loss, test_error: as in `Level`.
        method: that it comes from: "dropout", "readout", "head" or "trained".
        seconds: its share of the time.
        scale: factor of its outputs (dropout), NaN if there is none.
    """

    entry: int
    draw: int
    train_loss: float
    train_error: float
    test_loss: float = math.nan
    test_error: float = math.nan
    method: str = ""
    seconds: float = 0.0
    scale: float = math.nan


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True)
class Summary:
    """The draws of one entry layer.

    Attributes:
        entry: the entry layer l.
        draws: their number.
        mean, std: over the draws; the standard deviation is that of the draws themselves (divided
            by their number).
        best: the draw with the smallest training loss.
        best_by_error: the draw with the smallest training error, the one of smallest loss among
            several: the choice of Nguyen et al. 2021.
    """

    entry: int
    draws: int
    mean: Level
    std: Level
    best: Row
    best_by_error: Row


class StabilityTable:
    """Loss and error of subnetworks, a row per entry layer and draw, in that order.

    Two tables are equal where all numbers are, NaN counting as equal to NaN.

    Attributes:
        rows: sorted by entry layer and draw.
        original: the network's own numbers.

    Raises:
        ModeconnError: two rows are the same draw of the same entry layer.
    """

    def __init__(self, rows: Iterable[Row], original: Level) -> None:
        self.rows = sorted(rows, key=lambda row: (row.entry, row.draw))
        self.original = original
        for before, after in zip(self.rows, self.rows[1:]):
            if (before.entry, before.draw) == (after.entry, after.draw):
                raise ModeconnError(
                    f"entry layer {after.entry}, draw {after.draw} is there twice: "
                    "expected each draw once"
                )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def entries(self) -> list[int]:
        """The entry layers, rising."""
        return sorted({row.entry for row in self.rows})

    def select(self, entry: int) -> list[Row]:
        """Returns the draws of one entry layer; a ModeconnError lists the ones there are."""
        rows = [row for row in self.rows if row.entry == entry]
        if not rows:
            raise ModeconnError(
                f"entry layer {entry} is not in the table, which has {self.entries or 'none'}"
            )
        return rows

    def column(self, name: str, entry: int | None = None) -> np.ndarray:
        """Returns a numeric column as float64, of all rows or of one entry layer."""
        numeric = [column for column in COLUMNS if column != "method"]
        if name not in numeric:
            raise ModeconnError(f"column {name!r} is unknown: expected one of {', '.join(numeric)}")
        rows = self.rows if entry is None else self.select(entry)
        return np.array([getattr(row, name) for row in rows], np.float64)

    def summary(self) -> list[Summary]:
        """Summarises each entry layer: mean, standard deviation and best draw."""
        return [_summary(entry, self.select(entry)) for entry in self.entries]

    def __add__(self, other: StabilityTable) -> StabilityTable:
        """Joins the rows of two tables, as of a run that was interrupted and taken up again.

        Raises:
            ModeconnError: the original networks' numbers differ by more than rounding, or a draw is
                in both.
        """
        if not isinstance(other, StabilityTable):
            return NotImplemented
        for name, a, b in zip(MEASURES, astuple(self.original), astuple(other.original)):
            if not _close(a, b):
                raise ModeconnError(
                    "the tables are of different networks or data: "
                    f"the original's {name} is {a:.6g} in one and {b:.6g} in the other"
                )
        return StabilityTable([*self.rows, *other.rows], self.original)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StabilityTable):
            return NotImplemented
        return self._content() == other._content()

    __hash__ = None  # type: ignore[assignment]  # equal by content, and not frozen

    def _content(self) -> list[tuple[Any, ...]]:
        items: list[Level | Row] = [self.original, *self.rows]
        return [_comparable(astuple(item)) for item in items]

    # -- tables for people and programs ------------------------------------------------------------

    def to_frame(self) -> pandas.DataFrame:
        """Returns a pandas table with a row per draw; `attrs["original"]` is the network's level.

        Raises:
            ModeconnError: where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ModeconnError(
                "to_frame() needs pandas, which is not installed: pip install pandas"
            ) from None
        frame = pandas.DataFrame([asdict(row) for row in self.rows], columns=list(COLUMNS))
        frame.attrs[_ORIGINAL] = asdict(self.original)
        return frame

    def __repr__(self) -> str:
        original = f"original train_loss={self.original.train_loss:.4g}"
        return f"StabilityTable(rows={len(self)}, entries={self.entries}, {original})"

    def __str__(self) -> str:
        losses = [self.original.test_loss, *(row.test_loss for row in self.rows)]
        names = MEASURES[:2] if all(map(math.isnan, losses)) else MEASURES
        header, original = ["entry", "draws"], [_ORIGINAL, ""]
        for name in names:
            heading = name.replace("_", " ")
            header += [f"{heading} mean", f"{heading} ± std", f"{heading} best"]
            original += [_number(name, getattr(self.original, name)), "", ""]
        summaries = [_cells(each, names) for each in self.summary()]
        return (
            aligned([header, *summaries, original])
            + "\nbest: the draw with the smallest training loss; errors in %"
        )

    # -- files -------------------------------------------------------------------------------------

    def save(self, file: str | os.PathLike[str]) -> None:
        """Writes the table, atomically, as the name says: .csv or .json. Numbers are kept bitwise.

        Raises:
            ModeconnError: another kind of name, or the file cannot be written.
        """
        suffix = _suffix(file)
        text = self._csv() if suffix == ".csv" else self._json()
        atomic_write(file, lambda stream: stream.write(text.encode()))

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> StabilityTable:
        """Reads what `save` wrote.

        Raises:
            ModeconnError: the file is missing or holds something else.
        """
        suffix = _suffix(file)
        try:
            text = Path(file).read_text(encoding="utf-8")
            return cls._from_csv(text) if suffix == ".csv" else cls._from_json(text)
        except FileNotFoundError:
            raise ModeconnError(f"{file}: no such file") from None
        except (OSError, ValueError, KeyError, TypeError) as error:  # ModeconnError is a ValueError
            raise ModeconnError(
                f"{file}: not a table saved by modeconn ({type(error).__name__}: {error})"
            ) from error

    def _csv(self) -> str:
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerow(["", "", *map(repr, astuple(self.original)), _ORIGINAL, "", ""])
        for row in self.rows:
            writer.writerow([v if isinstance(v, str) else repr(v) for v in astuple(row)])
        return stream.getvalue()

    @classmethod
    def _from_csv(cls, text: str) -> StabilityTable:
        header, *lines = csv.reader(io.StringIO(text))
        if tuple(header) != COLUMNS:
            raise ValueError(f"columns {header}, expected {list(COLUMNS)}")
        (own,) = (line for line in lines if line[0] == "")
        original = Level(*map(float, own[2:6]))
        return cls(
            [_row(dict(zip(COLUMNS, line, strict=True))) for line in lines if line[0] != ""],
            original,
        )

    def _json(self) -> str:
        content = {
            "format": FORMAT,
            "original": _encoded(asdict(self.original)),
            "rows": [_encoded(asdict(row)) for row in self.rows],
        }
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def _from_json(cls, text: str) -> StabilityTable:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT!r}")
        original = Level(*(float(content["original"][name]) for name in MEASURES))
        return cls([_row(row) for row in content["rows"]], original)


def aligned(lines: Sequence[Sequence[str]], left: int = 0) -> str:
    """Aligns cells in columns: the first `left` columns flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = []
        for i, (cell, width) in enumerate(zip(line, widths)):
            cells.append(cell.ljust(width) if i < left else cell.rjust(width))
        texts.append("  ".join(cells).rstrip())
    return "\n".join(texts)


def same_level(a: Level, b: Level) -> bool:
    """Whether two levels are of one network on the same data: equal up to rounding."""
    return all(map(_close, astuple(a), astuple(b)))


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9) or (math.isnan(a) and math.isnan(b))


def _cells(summary: Summary, names: Sequence[str]) -> list[str]:
    """Returns the cells of one entry layer."""
    cells = [str(summary.entry), str(summary.draws)]
    for name in names:
        parts = (summary.mean, summary.std, summary.best)
        cells += [_number(name, getattr(part, name)) for part in parts]
    return cells


def _measures(row: Row) -> list[float]:
    return [getattr(row, name) for name in MEASURES]


def _summary(entry: int, rows: Sequence[Row]) -> Summary:
    values = np.array([_measures(row) for row in rows], np.float64)
    with np.errstate(invalid="ignore"):  # the deviation of infinite losses is NaN
        mean, std = values.mean(0), values.std(0)
    best = rows[ranking.order(values[:, 0])[0]]
    finite = [row for row in rows if math.isfinite(row.train_loss)] or rows
    best_by_error = min(finite, key=lambda row: (row.train_error, row.train_loss))
    levels = Level(*mean.tolist()), Level(*std.tolist())
    return Summary(entry, len(rows), *levels, best, best_by_error)


def _number(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:.2f}" if name.endswith("error") else f"{value:.4g}"


def _row(values: dict[str, Any]) -> Row:
    texts = {name: values[name] for name in COLUMNS}
    return Row(
        int(texts.pop("entry")),
        int(texts.pop("draw")),
        method=str(texts.pop("method")),
        **{name: float(value) for name, value in texts.items()},
    )


def _encoded(values: dict[str, Any]) -> dict[str, Any]:
    """Makes values that JSON holds: NaN and infinity become text, which float() reads."""
    return {name: _encoded_value(value) for name, value in values.items()}


def _encoded_value(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _comparable(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replaces NaN, which is not equal to itself, by text."""
    return tuple("nan" if isinstance(v, float) and math.isnan(v) else v for v in values)


def _suffix(file: str | os.PathLike[str]) -> str:
    suffix = Path(file).suffix.lower()
    if suffix not in SUFFIXES:
        raise ModeconnError(
            f"{file}: a table is saved as {' or '.join(SUFFIXES)}, not as {suffix or 'a bare name'}"
        )
    return suffix
