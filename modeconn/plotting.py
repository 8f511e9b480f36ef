"""Pictures of plain arrays of results, with matplotlib and as Unicode text for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

LOSS_COLOUR, ERROR_COLOURS = "#1f5fa8", ("#c8541b", "#8a6d1f", "#7a3f87")
# A curve of so many points or fewer shows them as dots: more would run together.
FEW = 12
# A range beyond this factor is shown on a logarithmic scale: evenly spaced levels would show only
# the largest values.
_LOGARITHMIC = 30
SHADES = " ·:░▒▓█"
BRAILLE = 0x2800
# The bit of each of the 4 x 2 dots of a Braille cell, by row and column.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
Ends = tuple[float, float]


def new_axes(surface: bool = False) -> Axes:
    """Make axes on a new pyplot figure, which notebooks show; in three dimensions for a surface."""
    try:
        import matplotlib.pyplot as pyplot
    except ImportError:
        raise ModeconnError(
            "plot() needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    space = {"projection": "3d"} if surface else None
    return pyplot.subplots(figsize=(7.2, 4.4), layout="constrained", subplot_kw=space)[1]


def draw_curve(
    ax: Axes,
    t: np.ndarray,
    values: np.ndarray,
    metric: str,
    ends: Ends | None,
    errors: Mapping[str, np.ndarray],
) -> None:
    """Draw a curve, the chord between its ends, and error rates on a second axis.

    Args:
        ax: matplotlib axes.
        t: ``[T]``, in any order.
        values: of the metric, ``[T]``.
        metric: its name.
        ends: the metric at t = 0 and t = 1, if known.
        errors: fractions ``[T]`` by name.
    """
    order = np.argsort(t, kind="stable")
    t, values = t[order], values[order]
    style: dict[str, Any] = {"color": LOSS_COLOUR, "marker": "o" if len(t) <= FEW else ""}
    lines = ax.plot(t, values, linewidth=2, label=metric, zorder=3, **style)
    if ends is not None:
        dashed: dict[str, Any] = {
            "linestyle": "--",
            "linewidth": 1,
            "alpha": 0.7,
            "label": "straight line",
        }
        lines += ax.plot([0, 1], ends, color=LOSS_COLOUR, **dashed)
        _annotate_barrier(ax, t, values, metric, ends)
    for bad in t[~np.isfinite(values)]:
        ax.axvline(bad, color="0.85", linewidth=3, zorder=0)
    ax.set_xlabel("position on the path, t")
    ax.set_ylabel(metric, color=LOSS_COLOUR)
    ax.tick_params(axis="y", labelcolor=LOSS_COLOUR)
    ax.set_xlim(*_extent(t))
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if errors:
        lines += _draw_errors(ax, {name: column[order] for name, column in errors.items()}, t)
    if len(lines) > 1:
        ax.legend(handles=lines, loc="upper left", frameon=False, fontsize="small")
    _set_limits(ax, values, len(lines))


def _annotate_barrier(ax: Axes, t: np.ndarray, values: np.ndarray, metric: str, ends: Ends) -> None:
    inside = (t >= 0) & (t <= 1) & np.isfinite(values)
    chord = (1 - t) * ends[0] + t * ends[1]
    gap = np.where(inside, values - chord, -np.inf)
    index = int(gap.argmax())
    if gap[index] <= 0.01 * np.ptp(values[np.isfinite(values)]):  # too small to draw, or rounding
        return
    ax.annotate(
        "",
        xy=(t[index], values[index]),
        xytext=(t[index], chord[index]),
        arrowprops={"arrowstyle": "<->", "color": "0.35", "shrinkA": 0, "shrinkB": 0},
    )
    left = t[index] > (t[0] + t[-1]) / 2
    ax.annotate(
        f"{metric} barrier {gap[index]:.3g}",
        xy=(t[index], chord[index] + 0.35 * gap[index]),
        xytext=(-6 if left else 6, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color="0.25",
        bbox=_box("white", pad=0.2, alpha=0.85),
        zorder=4,
    )


def _box(colour: str, pad: float, alpha: float) -> dict[str, Any]:
    """Return the style of the box behind an annotation."""
    style = f"round,pad={pad}"
    return {"boxstyle": style, "facecolor": colour, "edgecolor": "none", "alpha": alpha}


def _draw_errors(ax: Axes, errors: Mapping[str, np.ndarray], t: np.ndarray) -> list[Line2D]:
    right = ax.twinx()
    lines: list[Line2D] = []
    for index, (name, column) in enumerate(errors.items()):
        colour = ERROR_COLOURS[index % len(ERROR_COLOURS)]
        label = name.replace("_", "-")
        lines += right.plot(t, 100 * column, color=colour, linewidth=1.5, label=label)
    right.set_ylabel("error (%)", color=ERROR_COLOURS[0])
    right.tick_params(axis="y", labelcolor=ERROR_COLOURS[0])
    right.spines["top"].set_visible(False)
    _set_limits(right, 100 * np.concatenate([*errors.values()]), len(lines) + 2)
    # The metric and its barrier go on top of the errors.
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
    return lines


def _extent(t: np.ndarray) -> Ends:
    """Return the range of t, widened where it is a single value."""
    low, high = float(t.min()), float(t.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _set_limits(ax: Axes, values: np.ndarray, entries: int) -> None:
    """Set the vertical range, with room for a legend; it begins at zero or below."""
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = min(0.0, float(finite.min())), float(finite.max())
        ax.set_ylim(low, high + (0.06 + 0.06 * entries) * ((high - low) or 1.0))


def draw_plane(
    ax: Axes,
    t: np.ndarray,
    values: np.ndarray,
    metric: str,
    marks: Sequence[Sequence[float]],
    joined: bool = False,
) -> None:
    """Draw filled contours over a plane.

    Args:
        ax: matplotlib axes.
        t: ``[T, 2]``, a full grid or scattered points.
        values: of the metric, ``[T]``.
        metric: its name.
        marks: points to mark, in order.
        joined: whether a line joins them.
    """
    finite = np.isfinite(values)
    if not finite.any():
        raise ModeconnError(f"metric {metric!r} is finite nowhere: there is nothing to plot")
    levels, norm = _levels(values[finite])
    grid = as_grid(t, values)
    colours: dict[str, Any] = {"norm": norm, "cmap": "viridis"}
    filled: Any
    if grid is not None:
        x, y, z = grid
        filled = ax.contourf(x, y, np.ma.masked_invalid(z), levels=levels, **colours)
    elif np.linalg.matrix_rank(t[finite] - t[finite][0]) == 2:
        filled = ax.tricontourf(
            t[finite, 0], t[finite, 1], values[finite], levels=levels, **colours
        )
    else:  # all on one line: no area to fill
        filled = ax.scatter(t[finite, 0], t[finite, 1], c=values[finite], **colours)
    ax.figure.colorbar(filled, ax=ax, label=metric, format="%.3g")
    if joined:
        ax.plot(*zip(*marks), color="white", linewidth=1.2, alpha=0.8)
    dot: dict[str, Any] = {
        "color": "white",
        "markeredgecolor": "black",
        "markersize": 7,
        "clip_on": False,
    }
    for number, mark in enumerate(marks, 1):
        ax.plot(*mark, "o", **dot)
        ax.annotate(
            f"{number}",
            (mark[0], mark[1]),
            xytext=(6, 5),
            textcoords="offset points",
            color="white",
            fontweight="bold",
            bbox=_box("black", pad=0.15, alpha=0.55),
        )
    ax.set_xlabel("first coordinate of t")
    ax.set_ylabel("second coordinate of t")


def draw_surface(
    ax: Any, t: np.ndarray, values: np.ndarray, metric: str, marks: Sequence[Sequence[float]]
) -> None:
    """Draw ``values [T]`` over ``t [T, 2]`` as a surface, with vertical lines at marks.

    Where the values span more than a factor of 30, the heights are their logarithms, as the labels
    say.

    Args:
        ax: matplotlib axes in three dimensions.
        t: ``[T, 2]``, a full grid or scattered points.
        values: of the metric, ``[T]``.
        metric: its name.
        marks: points to mark, in order.
    """
    if not hasattr(ax, "plot_surface"):
        raise ModeconnError('a surface needs axes in three dimensions: made with projection="3d"')
    finite = np.isfinite(values)
    if not finite.any() or np.linalg.matrix_rank(t[finite] - t[finite][0]) < 2:
        raise ModeconnError(
            f"metric {metric!r} has no finite values that span a plane: there is no surface to draw"
        )
    logarithmic = _levels(values[finite])[1] is not None
    heights = values
    if logarithmic:
        heights = np.log10(values, where=values > 0, out=np.full(len(values), np.nan))
    grid = as_grid(t, np.where(np.isfinite(heights), heights, np.nan))
    if grid is not None:
        x, y, z = grid
        low, high = np.nanmin(z), np.nanmax(z)
        counts = {"rcount": len(y), "ccount": len(x)}
        ax.plot_surface(*np.meshgrid(x, y), z, cmap="viridis", vmin=low, vmax=high, **counts)
    else:
        ax.plot_trisurf(t[finite, 0], t[finite, 1], heights[finite], cmap="viridis")
    top = float(np.nanmax(heights[finite]))
    for number, (x_mark, y_mark) in enumerate(marks, 1):
        nearest = ((t[finite] - (x_mark, y_mark)) ** 2).sum(1).argmin()
        line = [x_mark] * 2, [y_mark] * 2, [heights[finite][nearest], top]
        ax.plot(*line, color="black", linewidth=1, zorder=5)
        ax.text(x_mark, y_mark, top, f"{number}", fontweight="bold", zorder=6)
    ax.set_xlabel("first coordinate of t")
    ax.set_ylabel("second coordinate of t")
    ax.set_zlabel(f"log10 of the {metric}" if logarithmic else metric)


def _levels(finite: np.ndarray) -> tuple[np.ndarray, object]:
    """Return contour levels, geometric where values span a large factor, and their norm."""
    from matplotlib.colors import LogNorm

    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high > _LOGARITHMIC * low:
        return np.geomspace(low, high, 25), LogNorm(low, high)
    return np.linspace(low, high if high > low else low + 1, 25), None


def as_grid(t: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return ``x [X]``, ``y [Y]`` and ``values [Y, X]`` of a full grid in any order, else None."""
    x, column = np.unique(t[:, 0], return_inverse=True)
    y, row = np.unique(t[:, 1], return_inverse=True)
    cells = len(np.unique(row * len(x) + column))
    if min(len(x), len(y)) < 2 or not len(x) * len(y) == len(t) == cells:
        return None
    grid = np.empty((len(y), len(x)))
    grid[row, column] = values
    return x, y, grid


def text_curve(
    t: np.ndarray, values: np.ndarray, metric: str, ends: Ends | None, width: int, height: int
) -> str:
    """Draw ``values [T]`` against ``t [T]`` as a Braille curve of `width` × `height` characters."""
    order = np.argsort(t, kind="stable")
    t, values = t[order], values[order]
    finite = np.isfinite(values)
    if not finite.any():
        return f"{metric}: finite at none of the {len(t)} points"
    low, high = _bounds(values[finite])
    labels = [f"{high:.3g}", f"{(low + high) / 2:.3g}", f"{low:.3g}"]
    margin = max(map(len, labels))
    rows, columns = height - 3, width - margin - 2
    cells = np.zeros((rows, columns), dtype=int)
    first, last = _extent(t)
    span = last - first

    def dot(x: float, y: float) -> None:
        down = round((high - y) / (high - low) * (4 * rows - 1))
        across = round((x - first) / span * (2 * columns - 1))
        cells[down // 4, across // 2] |= DOTS[down % 4][across % 2]

    if ends is not None:
        for x in np.linspace(0, 1, max(2, int(2 * columns / span) // 4 + 1)):
            dot(x, (1 - x) * ends[0] + x * ends[1])
    _trace(t, values, span, high - low, 2 * columns, 4 * rows, dot)
    bad = {round((x - first) / span * (columns - 1)) for x in t[~finite]}
    lines = [f"{metric:>{margin}}{'  (× where not finite)' if bad else ''}"]
    for row in range(rows):
        label = {0: labels[0], rows // 2: labels[1], rows - 1: labels[2]}.get(row, "")
        body = "".join(chr(BRAILLE + cell) if cell else " " for cell in cells[row])
        lines.append(f"{label:>{margin}} {'┤' if label else '│'}{body}".rstrip())
    return "\n".join([*lines, *_horizontal_axis(margin, columns, (first, last), bad)])


def _trace(
    t: np.ndarray,
    values: np.ndarray,
    x_span: float,
    y_span: float,
    across: int,
    down: int,
    dot: Callable[[float, float], None],
) -> None:
    """Put dots along the polyline through the finite points, dense enough to leave no holes."""
    for index in np.flatnonzero(np.isfinite(values)):
        dot(t[index], values[index])
        if index + 1 < len(t) and math.isfinite(values[index + 1]):
            run, rise = t[index + 1] - t[index], values[index + 1] - values[index]
            dots = max(abs(run) / x_span * across, abs(rise) / y_span * down)
            for part in np.linspace(0, 1, int(dots) + 2):
                dot(t[index] + part * run, values[index] + part * rise)


def _bounds(finite: np.ndarray) -> Ends:
    low, high = float(finite.min()), float(finite.max())
    if 0 <= low < high / 2:
        low = 0.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _horizontal_axis(
    margin: int, columns: int, extent: Ends, bad: Container[int] = ()
) -> list[str]:
    """Return the axis under a picture: a line with five ticks and a × where bad, and labels."""
    first, last = extent
    ticks = [round(part / 4 * (columns - 1)) for part in range(5)]
    line = "".join("×" if at in bad else "┬" if at in ticks else "─" for at in range(columns))
    text = [" "] * (columns + 2)
    for part, column in enumerate(ticks):
        label = f"{first + part / 4 * (last - first):.3g}"
        start = min(max(0, column - len(label) // 2), columns - len(label))
        text[start : start + len(label)] = label
    return [f"{'':>{margin}} └{line}", f"{'':>{margin}}  {''.join(text).rstrip()}"]


def text_plane(t: np.ndarray, values: np.ndarray, metric: str, width: int, height: int) -> str:
    """Draw ``values [T]`` over ``t [T, 2]`` as shades, each cell that of its nearest t."""
    finite = np.isfinite(values)
    if not finite.any():
        return f"{metric}: finite at none of the {len(t)} points"
    low, high = float(values[finite].min()), float(values[finite].max())
    scale = np.log if low > 0 and high > _LOGARITHMIC * low else np.asarray
    bottom, top = float(scale(np.float64(low))), float(scale(np.float64(high)))
    corner, opposite = t.min(axis=0), t.max(axis=0)
    span = np.where(opposite > corner, opposite - corner, 1.0)
    labels = [f"{opposite[1]:.3g}", f"{corner[1]:.3g}"]
    margin = max(map(len, labels))
    rows, columns = height - 3, width - margin - 2
    scaled = (t - corner) / span
    lines = [f"{metric}: '{SHADES[0]}' {low:.3g} … '{SHADES[-1]}' {high:.3g}, '!' not finite"]
    for row in range(rows):
        label = {0: labels[0], rows - 1: labels[1]}.get(row, "")
        body = ""
        for column in range(columns):
            place = np.array([column / (columns - 1), 1 - row / (rows - 1)])
            value = values[((scaled - place) ** 2).sum(axis=1).argmin()]
            if math.isfinite(value):
                part = (float(scale(value)) - bottom) / ((top - bottom) or 1.0)
                body += SHADES[round(part * (len(SHADES) - 1))]
            else:
                body += "!"
        lines.append(f"{label:>{margin}} {'┤' if label else '│'}{body}".rstrip())
    return "\n".join([*lines, *_horizontal_axis(margin, columns, _extent(t[:, 0]))])
