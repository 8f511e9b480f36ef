"""Points on a path as users give them: checked, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.errors import ModeconnError

# A count of points, or t values: a number, a sequence, an array or a tensor.
Points = Any


def is_count(points: Points) -> bool:
    """Whether points are a count, which `True` is not, nor is 101.0."""
    return isinstance(points, (int, np.integer)) and not isinstance(points, bool)


def t_values(points: Points, dim: int, kind: str) -> np.ndarray:
    """Check t values, and return them as float64 [T] for a curve, [T, dim] otherwise.

    Args:
        points: no count.
        dim: the number of coordinates of t.
        kind: of the path, for messages.

    Raises:
        ModeconnError: no values, values that are not finite or no numbers, or of the wrong shape.
    """
    t = _numbers(points)
    if t.ndim == 0:
        one = "[0.5]" if dim == 1 else f"[[{', '.join(['0.5'] * dim)}]]"
        raise ModeconnError(
            f"points is {t}, one number that is no count: expected points=101 for a count, or a "
            f"list such as {one} for one t"
        )
    if t.ndim == 1 and dim > 1:
        t = t[None]
    elif dim == 1 and t.ndim == 2 and t.shape[1] == 1:
        t = t[:, 0]
    expected = "[T]" if dim == 1 else f"[T, {dim}]"
    if t.size == 0:
        raise ModeconnError(f"points is empty: expected t values of shape {expected}")
    if t.ndim != (1 if dim == 1 else 2) or (dim > 1 and t.shape[1] != dim):
        raise ModeconnError(f"points has shape {list(t.shape)}: {kind} expects {expected}")
    if not np.isfinite(t).all():
        row = int(np.argmin(np.isfinite(t).reshape(len(t), -1).all(1)))
        raise ModeconnError(f"points[{row}] is {t[row]}: t must be finite")
    return t


def grid_over(extent: Sequence[tuple[float, float]], count: int | Sequence[int]) -> np.ndarray:
    """Return the points of a grid, the last coordinate changing fastest, float64 [T, dim].

    Args:
        extent: the range of each axis; both ends are points.
        count: how many points on each axis, one number for all or one for each.

    Raises:
        ModeconnError: a count below one, or not as many counts as axes.
    """
    counts = [count] * len(extent) if isinstance(count, (int, np.integer)) else [*count]
    whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in counts)
    if len(counts) != len(extent) or not whole or min(counts) < 1:
        raise ModeconnError(
            f"points is {count!r}: expected a whole number of points, at least 1, or one for each "
            f"of {len(extent)} axes"
        )
    axes = [np.linspace(*ends, n) for ends, n in zip(extent, counts)]
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)


def _numbers(points: Points) -> np.ndarray:
    """Points as float64; texts and truth values are no numbers, though NumPy converts them."""
    try:
        if points is None:  # which NumPy takes for nan
            raise TypeError
        given = np.asarray(points.detach().cpu() if isinstance(points, Tensor) else points)
        if given.dtype.kind in "iufO":
            return given.astype(np.float64)
    except (TypeError, ValueError):
        pass
    raise ModeconnError(
        f"points must be a count (points=101) or numbers (points=[0.0, 0.5]), got {points!r}"
    )
