"""Draws the figures of the paper's experiments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from modeconn.connection.connection import Connection
    from modeconn.evaluation.result import PathResult
    from modeconn.experiments.tables import Tables
    from modeconn.stability.table import StabilityTable

_PANELS = (
    ("train_loss", "training loss"),
    ("train_error", "training error (%)"),
    ("test_loss", "test loss"),
    ("test_error", "test error (%)"),
)
_COLOURS = ("#1f5fa8", "#4ea1d3")
_DROPOUT_COLOURS = ("#b02a2a", "#e0885f")


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


def _figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def layers(name: str, tables: Sequence[Tables]) -> Figure:
    """Draws loss and error by entry layer: subnetworks (A), dropout networks (B), network (O)."""
    figure, axes = _figure(2, 2)
    for ax, (column, label) in zip(axes, _PANELS, strict=True):
        for i, each in enumerate(tables):
            part = f", F = {each.fraction:g}" if len(tables) > 1 else ""
            subnetworks, dropout = _COLOURS[i % 2], _DROPOUT_COLOURS[i % 2]
            _draw_draws(ax, each.subnetworks, column, subnetworks, "A: subnetworks", part)
            _draw_draws(ax, each.dropout, column, dropout, "B: dropout", part)
        own = getattr(tables[0].subnetworks.original, column) * _factor(column)
        ax.axhline(own, color="0.35", lw=1, ls=":", label="O: the network")
        if column.endswith("loss"):
            ax.set_yscale("log")
        ax.set_xlabel("entry layer")
        ax.set_ylabel(label)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    figure.suptitle(name)
    return figure


def _factor(column: str) -> int:
    """Errors are drawn in percent."""
    return 100 if column.endswith("error") else 1


def _draw_draws(
    ax: Axes, table: StabilityTable, column: str, colour: str, title: str, part: str
) -> None:
    """Draws mean, spread and best draw of a table's column by entry layer.

    Args:
        title, part: of the legend: letter and kind of network, and the fraction if there are more.
    """
    factor = _factor(column)
    values = [table.column(column, entry) * factor for entry in table.entries]
    mean, std = np.array([v.mean() for v in values]), np.array([v.std() for v in values])
    best = [getattr(s.best, column) * factor for s in table.summary()]
    entries = table.entries
    ax.plot(entries, mean, color=colour, marker="o", ms=3, label=f"{title}{part}, mean ± std")
    # A logarithmic scale cannot show 0.
    floor = 1e-9 if column.endswith("loss") else 0
    lowest = np.maximum(mean - std, floor)
    ax.fill_between(entries, lowest, mean + std, color=colour, alpha=0.15, linewidth=0)
    ax.plot(entries, best, color=colour, ls="--", lw=1, label=f"{title[0]}: best draw{part}")


def widths(name: str, lines: Sequence[dict[str, Any]]) -> Figure:
    """Draws loss and error of the worst entry layer's best draw, by width."""
    figure, axes = _figure(1, 2)
    values = sorted({line["width"] for line in lines})
    for ax, measure in zip(axes, ("loss", "error"), strict=True):
        unit = "" if measure == "loss" else " (%)"
        for kind, colour, label in (
            ("subnetwork", _COLOURS[0], "A: subnetworks"),
            ("dropout", _DROPOUT_COLOURS[0], "B: dropout"),
        ):
            worst = [_worst(lines, width, f"{kind}_{measure}") for width in values]
            scaled = np.array(worst) * _factor(measure)
            ax.plot(values, scaled, color=colour, marker="o", ms=3, label=label)
        ax.set_xscale("log")
        if measure == "loss":
            ax.set_yscale("log")
        ax.set_xticks(values, [str(value) for value in values])
        ax.minorticks_off()
        ax.set_xlabel("width")
        ax.set_ylabel(f"training {measure}, worst entry layer{unit}")
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(name)
    return figure


def _worst(lines: Sequence[dict[str, Any]], width: int, measure: str) -> float:
    """Returns the largest value among the entry layers of one width."""
    values: list[float] = [line[measure] for line in lines if line["width"] == width]
    return max(values)


def path(connection: Connection, line: PathResult, curve: PathResult, level: float) -> Figure:
    """Draws a connection's own figure with the dropout networks' level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    ax = figure.add_subplot()
    connection.plot(ax, line=line, result=curve)
    ax.axhline(level, color="#7a4f9a", lw=1, ls="-.")
    ax.annotate(
        f"dropout {level:.3g}", (0.01, level), color="#7a4f9a", fontsize="small", va="bottom"
    )
    return figure
