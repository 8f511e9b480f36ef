"""Draws the figures of the paper's experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.experiments.tables import Interval
from modeconn.files.writing import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from modeconn.evaluation.result import PathResult
    from modeconn.experiments.tables import Tables
    from modeconn.stability.table import Level, StabilityTable

_PANELS = (
    ("train_loss", "training loss"),
    ("train_error", "training error (%)"),
    ("test_loss", "test loss"),
    ("test_error", "test error (%)"),
)
_COLOURS = ("#1f5fa8", "#4ea1d3")
_DROPOUT_COLOURS = ("#b02a2a", "#e0885f")
_OWN = "0.35"
# A logarithmic scale cannot show 0.
_FLOOR = 1e-9


def save(file: Path, draw: Callable[[], Figure]) -> None:
    """Writes a figure, atomically; raises a ModeconnError where matplotlib is not installed."""
    try:
        figure = draw()
    except ImportError:
        raise ModeconnError(
            "the figures need matplotlib, which is not installed: pip install 'modeconn[plot]'"
        ) from None
    kind = file.suffix[1:]
    atomic_write(
        file, lambda stream: figure.savefig(stream, format=kind, dpi=130, bbox_inches="tight")
    )


def _figure(rows: int, columns: int, title: str) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    return figure, axes


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )


def _factor(column: str) -> int:
    """Errors are drawn in percent."""
    return 100 if column.endswith("error") else 1


def _band(
    ax: Axes, x: Sequence[float], column: str, values: Sequence[Interval], **style: Any
) -> None:
    """Draws means and their intervals."""
    factor = _factor(column)
    mean = np.array([value.mean for value in values]) * factor
    half = np.array([value.half for value in values]) * factor
    (line,) = ax.plot(x, mean, **style)
    if half.any():
        lowest = np.maximum(mean - half, _FLOOR if column.endswith("loss") else 0)
        ax.fill_between(x, lowest, mean + half, color=line.get_color(), alpha=0.15, linewidth=0)


# -- loss and error by entry layer -----------------------------------------------------------------


def layers(title: str, tables: Sequence[Tables]) -> Figure:
    """Draws loss and error by entry layer: subnetworks (A), dropout networks (B), network (O).

    Of one solution mean, spread and best of the draws; of several the mean of their best draws
    with its 95 % interval.
    """
    figure, axes = _figure(2, 2, title)
    originals = tables[0].originals()
    for ax, (column, label) in zip(axes, _PANELS, strict=True):
        for i, each in enumerate(tables):
            part = f", F = {each.fraction:g}" if len(tables) > 1 else ""
            _draw_kind(ax, each, "subnetworks", column, _COLOURS[i % 2], f"A: subnetworks{part}")
            _draw_kind(ax, each, "dropout", column, _DROPOUT_COLOURS[i % 2], f"B: dropout{part}")
        own = Interval.of([getattr(level, column) for level in originals])
        ends = [tables[0].entries[0], tables[0].entries[-1]]
        name = "O: the networks" if len(originals) > 1 else "O: the network"
        _band(ax, ends, column, [own, own], color=_OWN, lw=1, ls=":", label=name)
        if column.endswith("loss"):
            ax.set_yscale("log")
        ax.set_xlabel("entry layer")
        ax.set_ylabel(label)
    _legend(figure, axes[0])
    return figure


def _draw_kind(ax: Axes, tables: Tables, kind: str, column: str, colour: str, label: str) -> None:
    """Draws one kind of networks by entry layer."""
    by_solution: tuple[StabilityTable, ...] = getattr(tables, kind)
    if len(by_solution) == 1:
        _draw_draws(ax, by_solution[0], column, colour, label)
        return
    entries = by_solution[0].entries
    values = []
    for entry in entries:
        best = tables.best(kind, entry)
        values.append(Interval.of([getattr(row, column) for row in best]))
    name = f"{label}, best draw, mean ± 95 %"
    _band(ax, entries, column, values, color=colour, marker="o", ms=3, label=name)


def _draw_draws(ax: Axes, table: StabilityTable, column: str, colour: str, label: str) -> None:
    """Draws mean, spread and best draw of a table's column by entry layer."""
    factor = _factor(column)
    columns = [table.column(column, entry) for entry in table.entries]
    values = [Interval(float(v.mean()), float(v.std())) for v in columns]
    name = f"{label}, mean ± std"
    _band(ax, table.entries, column, values, color=colour, marker="o", ms=3, label=name)
    best = [getattr(s.best_by_error, column) * factor for s in table.summary()]
    ax.plot(table.entries, best, color=colour, ls="--", lw=1, label=f"{label[0]}: best draw")


# -- by width --------------------------------------------------------------------------------------


def widths(title: str, by_width: dict[int, Tables]) -> Figure:
    """Draws the worst entry layer's best draw by width: A, B and the networks themselves (O)."""
    figure, axes = _figure(1, 3, title)
    values = sorted(by_width)
    panels = [panel for panel in _PANELS if panel[0] != "test_loss"]
    for ax, (column, label) in zip(axes, panels, strict=True):
        for kind, colour, name in (
            ("subnetworks", _COLOURS[0], "A: subnetworks"),
            ("dropout", _DROPOUT_COLOURS[0], "B: dropout"),
        ):
            worst = [_worst(by_width[width], kind, column) for width in values]
            _band(ax, values, column, worst, color=colour, marker="o", ms=3, label=name)
        own = [_own(by_width[width], column) for width in values]
        _band(ax, values, column, own, color=_OWN, lw=1, ls=":", label="O: the networks")
        ax.set_xscale("log")
        if column.endswith("loss"):
            ax.set_yscale("log")
        shown = values[:: 1 + len(values) // 8]
        ax.set_xticks(shown, labels=[str(width) for width in shown])
        ax.minorticks_off()
        ax.set_xlabel("width")
        ax.set_ylabel(f"{label}, worst entry layer")
    _legend(figure, axes[0])
    return figure


def _worst(tables: Tables, kind: str, column: str) -> Interval:
    """Returns, over solutions, the largest value of the best draws among the entry layers."""
    by_solution: tuple[StabilityTable, ...] = getattr(tables, kind)
    return Interval.of([_largest(table, column) for table in by_solution])


def _largest(table: StabilityTable, column: str) -> float:
    return max(float(getattr(each.best_by_error, column)) for each in table.summary())


def _own(tables: Tables, column: str) -> Interval:
    return Interval.of([getattr(level, column) for level in tables.originals()])


# -- along a path ----------------------------------------------------------------------------------


def path(
    title: str,
    curves: dict[str, tuple[PathResult, PathResult]],
    level: Level,
    own: Sequence[Level],
) -> Figure:
    """Draws loss and error along a path, on training and test data.

    Args:
        curves: "train" and "test": along the path, and along the straight line.
        level: of a path by dropout.
        own: the numbers of both networks.
    """
    figure, axes = _figure(2, 2, title)
    for ax, (column, label) in zip(axes, _PANELS, strict=True):
        part, _, measure = column.partition("_")
        factor = _factor(column)
        curve, line = curves[part]
        ax.plot(curve.t, curve.metric(measure) * factor, color=_COLOURS[0], label="A: the path")
        straight = line.metric(measure) * factor
        ax.plot(line.t, straight, color="0.6", lw=1, ls="--", label="straight line")
        ax.axhline(
            getattr(level, column) * factor, color=_DROPOUT_COLOURS[0], lw=1, label="B: by dropout"
        )
        worse = max(getattr(each, column) for each in own) * factor
        ax.axhline(worse, color=_OWN, lw=1, ls=":", label="O: the worse network")
        if column.endswith("loss"):
            ax.set_yscale("log")
        ax.set_xlabel("t")
        ax.set_ylabel(label)
    _legend(figure, axes[0])
    return figure
