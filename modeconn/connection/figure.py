"""The picture of a connection: loss and error along the path, the certified bound, and what each segment does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from modeconn.connection.certificate import Certificate
from modeconn.connection.structure import KINDS, REWRITE, SHIFT, SWING
from modeconn.evaluation.result import PathResult
from modeconn.plotting import ERROR_COLOURS, LOSS_COLOUR, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SHADES = {REWRITE: "#f0f0f0", SHIFT: "#dfe9d8", SWING: "white"}
BOUND_COLOUR, LINE_COLOUR = "#b02a2a", "0.45"
_DECADES = 10.0  # a loss that spans more than this factor is drawn on a logarithmic scale


def draw(
    certificate: Certificate, ax: Axes | None, line: PathResult | None, result: PathResult | None
) -> Axes:
    """Draw a certificate's path.

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
    t = np.array(
        [certificate.segments[0].start, *(segment.end for segment in certificate.segments)]
    )
    handles = _shade(ax, certificate)
    handles += _draw_loss(ax, t, certificate, line, result)
    handles += _draw_error(right, t, certificate, line, result)
    ax.set_xlim(0, 1)
    ax.set_xlabel("position on the path, t")
    ax.set_ylabel("loss", color=LOSS_COLOUR)
    ax.tick_params(axis="y", labelcolor=LOSS_COLOUR)
    right.set_ylabel("error (%)", color=ERROR_COLOURS[0])
    right.tick_params(axis="y", labelcolor=ERROR_COLOURS[0])
    for axis in (ax, right):
        axis.spines["top"].set_visible(False)
    ax.set_title(
        f"Certified path: {len(certificate.segments)} segments, {certificate.samples:,} samples",
        pad=8,
    )
    # Below the axes: there the legend cannot hide a curve.
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=2,
        frameon=False,
        fontsize="small",
        columnspacing=1.4,
        handlelength=1.8,
    )
    return ax


def _shade(ax: Axes, certificate: Certificate) -> list[Line2D]:
    """Paint the kinds of segments behind everything, one patch for neighbours of a kind; returns what the legend shows."""
    from matplotlib.patches import Patch

    segments = certificate.segments
    for segment in segments:
        ax.axvspan(
            segment.start,
            segment.end,
            facecolor=SHADES[segment.kind],
            edgecolor="0.88",
            linewidth=0.4,
            zorder=0,
        )
    names = {
        REWRITE: "rewrite: function constant",
        SHIFT: "shift: function constant",
        SWING: "swing: loss convex",
    }
    used = {segment.kind for segment in segments}
    patches: Sequence[object] = [
        Patch(facecolor=SHADES[kind], edgecolor="0.7", label=names[kind])
        for kind in KINDS
        if kind in used
    ]
    return list(patches)  # type: ignore[arg-type]


def _draw_loss(
    ax: Axes,
    t: np.ndarray,
    certificate: Certificate,
    line: PathResult | None,
    result: PathResult | None,
) -> list[Line2D]:
    losses = np.array(certificate.losses)
    drawn = [losses]
    handles: list[Line2D] = []
    if line is not None:
        order = np.argsort(line.t)
        label = f"straight line: loss, up to {np.nanmax(line.loss):.3g}"
        handles += ax.plot(
            line.t[order],
            line.loss[order],
            "--",
            color=LINE_COLOUR,
            linewidth=1.2,
            label=label,
            zorder=2,
        )
        drawn.append(line.loss)
    if result is not None:
        order = np.argsort(result.t, kind="stable")
        handles += ax.plot(
            result.t[order],
            result.loss[order],
            color=LOSS_COLOUR,
            linewidth=1.6,
            label="loss on the path",
            zorder=4,
        )
        ax.plot(t, losses, "o", color=LOSS_COLOUR, markersize=2.5, zorder=5)
    else:
        handles += ax.plot(
            t,
            losses,
            "o-",
            color=LOSS_COLOUR,
            linewidth=1.6,
            markersize=2.5,
            label="loss, chord of each segment",
            zorder=4,
        )
    if np.isfinite(certificate.bound):
        label = f"certified bound: loss ≤ {certificate.bound:.3g}"
        handles.append(
            ax.axhline(certificate.bound, color=BOUND_COLOUR, linewidth=1.2, label=label, zorder=3)
        )
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > _DECADES * values.min():
        ax.set_yscale("log")
        ax.set_ylim(values.min() / 2, values.max() * 3)
    elif len(values):
        ax.set_ylim(min(0.0, float(values.min())), (float(values.max()) or 1.0) * 1.15)
    return handles


def _draw_error(
    ax: Axes,
    t: np.ndarray,
    certificate: Certificate,
    line: PathResult | None,
    result: PathResult | None,
) -> list[Line2D]:
    colour = ERROR_COLOURS[0]
    label = f"error on the path, ≤ {100 * certificate.error_bound:.3g} %"
    if result is not None and "error" in result.values:
        order = np.argsort(result.t, kind="stable")
        at, error = result.t[order], result.values["error"][order]
    else:
        middles = np.array([segment.max_error_at for segment in certificate.segments])
        at = np.concatenate([t, middles])
        error = np.concatenate(
            [certificate.errors, [segment.max_error for segment in certificate.segments]]
        )
        order = np.argsort(at, kind="stable")
        at, error = at[order], error[order]
    handles = ax.plot(
        at, 100 * error, color=colour, linewidth=1.2, alpha=0.9, label=label, zorder=3
    )
    if line is not None and "error" in line.values:
        # The straight line's error is usually off the scale that shows the path's: it is named, not
        # drawn.
        label = f"straight line: error up to {100 * float(np.nanmax(line.error)):.3g} % (not drawn)"
        handles += ax.plot([], [], " ", label=label)
    # In the lower half of the picture, where there is room below the loss, unless errors are that
    # large.
    ax.set_ylim(0, min(100.0, 220 * (certificate.error_bound or 0.01)))
    return handles
