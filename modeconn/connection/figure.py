"""Draws a connection: loss and error along the path, the certified bound, the kinds of segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from modeconn.connection.certificate import Certificate
from modeconn.connection.segment_kinds import KINDS, REWRITE, SHIFT, SWING
from modeconn.evaluation.result import PathResult
from modeconn.plotting import ERROR_COLOURS, LOSS_COLOUR, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SHADES = {REWRITE: "#f0f0f0", SHIFT: "#dfe9d8", SWING: "white"}
BOUND_COLOUR, LINE_COLOUR = "#b02a2a", "0.45"
_MEANINGS = {
    REWRITE: "rewrite: function constant",
    SHIFT: "shift: function constant",
    SWING: "swing: loss convex",
}
# A loss that spans more than this factor is drawn on a logarithmic scale: on a linear one its small
# values would lie on the axis.
_DECADES = 10.0


def draw(
    certificate: Certificate, ax: Axes | None, line: PathResult | None, result: PathResult | None
) -> Axes:
    """Draws a certificate's path.

    Args:
        ax: axes to draw on; a new figure if None.
        line: the straight line between the end points, for comparison.
        result: the path evaluated at more points; without it a swing's loss is drawn as its chord.

    Raises:
        ModeconnError: where matplotlib is not installed.
    """
    if ax is None:
        ax = new_axes()
    right = ax.twinx()
    handles = _shade(ax, certificate)
    handles += _draw_loss(ax, certificate, line, result)
    handles += _draw_error(right, certificate, line, result)
    _label_axes(ax, right)
    ax.set_title(
        f"Certified path: {len(certificate.segments)} segments, {certificate.samples:,} samples",
        pad=8,
    )
    # Below the axes: there the legend cannot hide a curve.
    layout: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncols": 2}
    spacing: dict[str, Any] = {"columnspacing": 1.4, "handlelength": 1.8}
    ax.legend(handles=handles, frameon=False, fontsize="small", **layout, **spacing)
    return ax


def _label_axes(ax: Axes, right: Axes) -> None:
    ax.set_xlim(0, 1)
    ax.set_xlabel("position on the path, t")
    ax.set_ylabel("loss", color=LOSS_COLOUR)
    ax.tick_params(axis="y", labelcolor=LOSS_COLOUR)
    right.set_ylabel("error (%)", color=ERROR_COLOURS[0])
    right.tick_params(axis="y", labelcolor=ERROR_COLOURS[0])
    for axis in (ax, right):
        axis.spines["top"].set_visible(False)


def _breakpoints(certificate: Certificate) -> np.ndarray:
    """Returns t of the breakpoints."""
    segments = certificate.segments
    return np.array([segments[0].start, *(segment.end for segment in segments)])


def _shade(ax: Axes, certificate: Certificate) -> list[Line2D]:
    """Paints the kinds of segments behind everything; returns handles for the legend."""
    from matplotlib.patches import Patch

    border: dict[str, Any] = {"edgecolor": "0.88", "linewidth": 0.4}
    for segment in certificate.segments:
        shade = SHADES[segment.kind]
        ax.axvspan(segment.start, segment.end, facecolor=shade, zorder=0, **border)
    used = {segment.kind for segment in certificate.segments}
    patches: Sequence[object] = [
        Patch(facecolor=SHADES[kind], edgecolor="0.7", label=_MEANINGS[kind])
        for kind in KINDS
        if kind in used
    ]
    return list(patches)  # type: ignore[arg-type]


def _draw_loss(
    ax: Axes, certificate: Certificate, line: PathResult | None, result: PathResult | None
) -> list[Line2D]:
    """Draws losses and the bound on the left axes; returns handles for the legend."""
    losses = np.array(certificate.losses)
    drawn = [losses]
    handles: list[Line2D] = []
    if line is not None:
        handles += _draw_line(ax, line)
        drawn.append(line.loss)
    handles += _draw_path_loss(ax, _breakpoints(certificate), losses, result)
    if np.isfinite(certificate.bound):
        label = f"certified bound: loss ≤ {certificate.bound:.3g}"
        handles.append(
            ax.axhline(certificate.bound, color=BOUND_COLOUR, linewidth=1.2, label=label, zorder=3)
        )
    _scale_losses(ax, np.concatenate(drawn))
    return handles


def _draw_line(ax: Axes, line: PathResult) -> list[Line2D]:
    order = np.argsort(line.t)
    label = f"straight line: loss, up to {np.nanmax(line.loss):.3g}"
    t, loss = line.t[order], line.loss[order]
    return ax.plot(t, loss, "--", color=LINE_COLOUR, linewidth=1.2, label=label, zorder=2)


def _draw_path_loss(
    ax: Axes, t: np.ndarray, losses: np.ndarray, result: PathResult | None
) -> list[Line2D]:
    """Draws the loss at all points that were evaluated, else the chords between breakpoints."""
    curve: dict[str, Any] = {"color": LOSS_COLOUR, "linewidth": 1.6, "zorder": 4}
    if result is None:
        label = "loss, chord of each segment"
        return ax.plot(t, losses, "o-", markersize=2.5, label=label, **curve)
    order = np.argsort(result.t, kind="stable")
    handles = ax.plot(result.t[order], result.loss[order], label="loss on the path", **curve)
    ax.plot(t, losses, "o", color=LOSS_COLOUR, markersize=2.5, zorder=5)
    return handles


def _scale_losses(ax: Axes, losses: np.ndarray) -> None:
    """Chooses a linear or logarithmic scale that shows all finite losses."""
    values = losses[np.isfinite(losses)]
    if len(values) and values.min() > 0 and values.max() > _DECADES * values.min():
        ax.set_yscale("log")
        ax.set_ylim(values.min() / 2, values.max() * 3)
    elif len(values):
        ax.set_ylim(min(0.0, float(values.min())), (float(values.max()) or 1.0) * 1.15)


def _draw_error(
    ax: Axes, certificate: Certificate, line: PathResult | None, result: PathResult | None
) -> list[Line2D]:
    """Draws the error on the right axes; returns handles for the legend."""
    at, error = _error_curve(certificate, result)
    known = result is not None and "error" in result.values
    what = "error on the path" if known else "largest error of each segment"
    label = f"{what}, ≤ {100 * certificate.error_bound:.3g} %"
    style: dict[str, Any] = {"color": ERROR_COLOURS[0], "linewidth": 1.2, "alpha": 0.9}
    handles = ax.plot(at, 100 * error, label=label, zorder=3, **style)
    if line is not None and "error" in line.values:
        # The straight line's error is usually off the scale that shows the path's: it is named, not
        # drawn.
        label = f"straight line: error up to {100 * float(np.nanmax(line.error)):.3g} % (not drawn)"
        handles += ax.plot([], [], " ", label=label)
    # In the lower half of the picture, where there is room below the loss, unless errors are that
    # large.
    ax.set_ylim(0, min(100.0, 220 * (certificate.error_bound or 0.01)))
    return handles


def _error_curve(
    certificate: Certificate, result: PathResult | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns t and error: as evaluated, else steps at each segment's largest error.

    A line from breakpoint to breakpoint would lie below the error in between.
    """
    if result is not None and "error" in result.values:
        order = np.argsort(result.t, kind="stable")
        return result.t[order], result.values["error"][order]
    at = np.repeat(_breakpoints(certificate), 2)[1:-1]
    return at, np.repeat([segment.max_error for segment in certificate.segments], 2)
