"""The figures of the paper's experiments."""

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

_PANELS = (
    ("train_loss", "training loss"),
    ("train_error", "training error (%)"),
    ("test_loss", "test loss"),
    ("test_error", "test error (%)"),
)
_COLOURS = ("#1f5fa8", "#4ea1d3")
_DROPOUT_COLOURS = ("#b02a2a", "#e0885f")


def save(file: Path, draw: Callable[[], Figure]) -> None:
    """Write a figure, atomically; a ModeconnError where matplotlib is not installed."""
    try:
        figure = draw()
    except ImportError:
        raise ModeconnError(
            "the figures need matplotlib, which is not installed: pip install 'modeconn[plot]'"
        ) from None
    atomic_write(
        file,
        lambda stream: figure.savefig(stream, format=file.suffix[1:], dpi=130, bbox_inches="tight"),
    )


def _figure(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(rows * columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def layers(name: str, tables: Sequence[Tables]) -> Figure:
    """Loss and error by entry layer: subnetworks (A), dropout networks (B), the network itself (O)."""
    figure, axes = _figure(2, 2)
    for ax, (column, label) in zip(axes, _PANELS, strict=True):
        factor = 100 if column.endswith("error") else 1
        for i, each in enumerate(tables):
            for letter, table, colours in (
                ("A", each.subnetworks, _COLOURS),
                ("B", each.dropout, _DROPOUT_COLOURS),
            ):
                values = [table.column(column, entry) * factor for entry in table.entries]
                mean, std = (
                    np.array([v.mean() for v in values]),
                    np.array([v.std() for v in values]),
                )
                best = [getattr(s.best, column) * factor for s in table.summary()]
                colour, what = colours[i % 2], "subnetworks" if letter == "A" else "dropout"
                part = f", F = {each.fraction:g}" if len(tables) > 1 else ""
                ax.plot(
                    table.entries,
                    mean,
                    color=colour,
                    marker="o",
                    ms=3,
                    label=f"{letter}: {what}{part}, mean ± std",
                )
                floor = 1e-9 if column.endswith("loss") else 0
                ax.fill_between(
                    table.entries,
                    np.maximum(mean - std, floor),
                    mean + std,
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
                ax.plot(
                    table.entries,
                    best,
                    color=colour,
                    ls="--",
                    lw=1,
                    label=f"{letter}: best draw{part}",
                )
        own = getattr(tables[0].subnetworks.original, column) * factor
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


def widths(name: str, lines: Sequence[dict[str, Any]]) -> Figure:
    """Loss and error of the worst entry layer's best draw, by width."""
    figure, axes = _figure(1, 2)
    values = sorted({line["width"] for line in lines})
    for ax, part in zip(axes, ("loss", "error"), strict=True):
        for kind, colour, label in (
            ("subnetwork", _COLOURS[0], "A: subnetworks"),
            ("dropout", _DROPOUT_COLOURS[0], "B: dropout"),
        ):
            worst = [
                max(line[f"{kind}_{part}"] for line in lines if line["width"] == width)
                for width in values
            ]
            ax.plot(
                values,
                np.array(worst) * (100 if part == "error" else 1),
                color=colour,
                marker="o",
                ms=3,
                label=label,
            )
        ax.set_xscale("log")
        if part == "loss":
            ax.set_yscale("log")
        ax.set_xticks(values, [str(value) for value in values])
        ax.minorticks_off()
        ax.set_xlabel("width")
        ax.set_ylabel(
            "training loss, worst entry layer"
            if part == "loss"
            else "training error, worst entry layer (%)"
        )
    axes[0].legend(frameon=False, fontsize="small")
    figure.suptitle(name)
    return figure


def path(connection: Connection, line: PathResult, curve: PathResult, level: float) -> Figure:
    """The connection's own figure with the dropout networks' level."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5))
    ax = figure.add_subplot()
    connection.plot(ax, line=line, result=curve)
    ax.axhline(level, color="#7a4f9a", lw=1, ls="-.")
    ax.annotate(
        f"dropout {level:.3g}", (0.01, level), color="#7a4f9a", fontsize="small", va="bottom"
    )
    return figure
