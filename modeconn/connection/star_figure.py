"""Draws a star of connected networks: a ray for each of them, coloured by the loss along it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from modeconn.connection.certificate import Certificate
from modeconn.evaluation.result import PathResult
from modeconn.plotting import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A loss of 0 has no logarithm: it is drawn as this.
_SMALLEST = 1e-12
# Points of a ray between two breakpoints: what a change of colour needs.
_STEPS = 8


def draw(
    certificates: Mapping[str, Certificate],
    ax: Axes | None,
    lines: Mapping[tuple[str, str], PathResult] | None,
) -> Axes:
    """Draws the hub in the middle and the networks around it, in equal angles.

    Args:
        certificates: by name, of the path from a network down to the hub.
        ax: axes to draw on; a new figure if None.
        lines: straight lines between pairs of networks, drawn dashed with their largest loss.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    axes = new_axes() if ax is None else ax
    places = _places(list(certificates))
    losses = np.concatenate([each.losses for each in certificates.values()])
    finite = np.maximum(losses[np.isfinite(losses)], _SMALLEST)
    norm = LogNorm(finite.min(), max(finite.max(), 1.01 * finite.min()))
    for pair, line in (lines or {}).items():
        _draw_line(axes, places[pair[0]], places[pair[1]], line)
    for name, certificate in certificates.items():
        _draw_ray(axes, places[name], name, certificate, norm)
    axes.plot(0, 0, "o", color="black", markersize=9, zorder=5)
    axes.annotate("hub: S_0", (0, 0), (0, -18), textcoords="offset points", ha="center", zorder=6)
    bound = max(each.bound for each in certificates.values())
    count = len(certificates)
    axes.set_title(f"{count} networks, {count * (count - 1) // 2} pairs: loss ≤ {bound:.3g}")
    axes.set_aspect("equal")
    axes.set_xlim(-1.35, 1.35)
    axes.set_ylim(-1.35, 1.35)
    axes.axis("off")
    axes.figure.colorbar(ScalarMappable(norm, "viridis_r"), ax=axes, label="loss", shrink=0.7)
    return axes


def _places(names: list[str]) -> dict[str, tuple[float, float]]:
    """Puts names on the unit circle, the first at the top."""
    angles = [math.pi / 2 - 2 * math.pi * k / len(names) for k in range(len(names))]
    return {name: (math.cos(a), math.sin(a)) for name, a in zip(names, angles)}


def _draw_ray(
    ax: Axes, place: tuple[float, float], name: str, certificate: Certificate, norm: object
) -> None:
    """Draws a descent from the circle to the middle, breakpoints evenly spaced."""
    from matplotlib.collections import LineCollection

    losses = np.maximum(np.array(certificate.losses), _SMALLEST)
    along = np.linspace(1.0, 0.0, (len(losses) - 1) * _STEPS + 1)
    values = np.exp(np.interp(along[::-1], np.linspace(0, 1, len(losses)), np.log(losses[::-1])))
    points = along[:, None] * np.array(place)
    pieces = np.stack([points[:-1], points[1:]], 1)
    rays = LineCollection(list(pieces), cmap="viridis_r", norm=norm, linewidths=4, zorder=3)
    rays.set_array(values[::-1][:-1])
    ax.add_collection(rays)
    at = np.linspace(1.0, 0.0, len(losses))[:, None] * np.array(place)
    ax.plot(at[:, 0], at[:, 1], "o", color="0.25", markersize=2, zorder=4)
    text = f"{name}\nloss {certificate.losses[0]:.2g}"
    x, y = 1.17 * place[0], 1.17 * place[1]
    ax.text(x, y, text, ha="center", va="center", fontsize="small")


def _draw_line(
    ax: Axes, first: tuple[float, float], second: tuple[float, float], line: PathResult
) -> None:
    """Draws a straight line between two networks, dashed, with its largest loss."""
    xs, ys = (first[0], second[0]), (first[1], second[1])
    ax.plot(xs, ys, "--", color="0.7", linewidth=1, zorder=1)
    # Away from the middle, where lines cross.
    where = 0.4 * first[0] + 0.6 * second[0], 0.4 * first[1] + 0.6 * second[1]
    label = f"{np.nanmax(line.loss):.2g}"
    ax.text(*where, label, fontsize="x-small", color="0.4", ha="center", va="center")
