"""Linear assignment: which unit of one network is which of another's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.training.alignment.groups import Group
from modeconn.training.alignment.layouts import Permutations


def solver() -> Any:
    """Return SciPy's solver.

    Raises:
        ModeconnError: SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ModeconnError(
            "align needs scipy, which is not installed: pip install 'modeconn[align]'"
        ) from error
    return linear_sum_assignment


def best(similarity: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the permutation p with the largest Σ_i similarity[i, p[i]], and that sum."""
    rows, columns = solver()(similarity, maximize=True)
    return columns, float(similarity[rows, columns].sum())


def matched(
    outer: str,
    inner: list[Group],
    similarities: Mapping[str, np.ndarray],
    outer_is_free: bool,
) -> Permutations:
    """Match a group's units, and those within each of them, together.

    Args:
        outer: the group, or an axis that stays as it is.
        inner: the groups within it.
        similarities: by group, of the outer units [n, n], and of those within each pair of them
            [n, n, m, m]; nothing of groups of which nothing is known.
        outer_is_free: whether the outer units are permuted.
    """
    own = similarities.get(outer)
    if not inner:
        return {} if own is None else {outer: best(own)[0]}
    known = [group for group in inner if group.name in similarities]
    if not known and own is None:
        return {}
    count = inner[0].copies
    worth = np.zeros((count, count)) if own is None else own.copy()
    choices: dict[str, np.ndarray] = {}
    for group in known:
        table = similarities[group.name]
        choices[group.name] = chosen = np.empty((count, count, group.size), np.int64)
        for i in range(count):
            for j in range(count) if outer_is_free else (i,):
                chosen[i, j], value = best(table[i, j])
                worth[i, j] += value
    order = best(worth)[0] if outer_is_free else np.arange(count)
    found: Permutations = {outer: order} if outer_is_free else {}
    for name, chosen in choices.items():
        found[name] = chosen[np.arange(count), order]
    return found
