"""Ranks values of a metric: lowest first, and what is not finite last."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from modeconn.errors import ModeconnError


def order(values: np.ndarray | Sequence[float]) -> np.ndarray:
    """Return the indices of values in rising order, equal ones as they come.

    NaN and both infinities come last, as they come: a network that overflows is no best one.
    """
    column = np.asarray(values, np.float64)
    return np.where(np.isfinite(column), column, math.inf).argsort(kind="stable")


def best(values: np.ndarray | Sequence[float], what: str) -> int:
    """Return the index of the lowest finite value.

    Args:
        values: of a metric.
        what: names the metric and what it was measured on, for the error.

    Raises:
        ModeconnError: none of the values is finite.
    """
    first = int(order(values)[0])
    if not math.isfinite(values[first]):
        raise ModeconnError(
            f"{what} is finite for none of {len(values):,}: there is no best one; look for NaN or "
            'huge weights in the checkpoints, or try precision "float64"'
        )
    return first
