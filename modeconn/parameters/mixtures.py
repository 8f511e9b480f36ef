"""Coefficients of mixtures: simplex grids and draws, subsets, task arithmetic, greedy soups.

Coefficients for a `Mixture` of n networks, float64 [T, n]. One evaluation takes hundreds of them in
one pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.parameters import ranking

# More mixtures than anyone looks at are a slip of typing.
MOST = 100_000
# All subsets of so many networks are still few: 1023.
MOST_OF_SUBSETS = 10


def simplex_grid(count: int, steps: int) -> np.ndarray:
    """Return all coefficients that are multiples of 1/steps, at least 0, and sum to 1."""
    _limit(math.comb(steps + count - 1, count - 1))
    places = steps + count - 1
    bars = [(-1, *each, places) for each in itertools.combinations(range(places), count - 1)]
    grid: np.ndarray = (np.diff(np.array(bars)) - 1.0) / steps
    return grid


def random_simplex(count: int, draws: int, seed: int = 0) -> np.ndarray:
    """Return the mean of the networks, then coefficients drawn uniformly from the simplex."""
    _limit(draws)
    drawn = np.random.default_rng(seed).dirichlet(np.ones(count), draws)
    return np.concatenate([np.full((1, count), 1.0 / count), drawn])


def subset_means(count: int) -> np.ndarray:
    """Return the mean of every subset of the networks, each alone included.

    These are the uniform soups of Wortsman et al. 2022.
    """
    if count > MOST_OF_SUBSETS:
        raise ModeconnError(
            f"{count} networks have {2**count - 1:,} subsets: "
            f"expected at most {MOST_OF_SUBSETS} networks"
        )
    subsets = np.array(list(itertools.product((0.0, 1.0), repeat=count)))[1:]
    means: np.ndarray = subsets / subsets.sum(1, keepdims=True)
    return means


def task_arithmetic(count: int, scales: Sequence[float]) -> np.ndarray:
    """Return base + Σ x_i · (network_i - base) for every choice of the scales x_i.

    Task arithmetic (Ilharco et al. 2023); the base is the last of the networks.
    """
    _limit(len(scales) ** count)
    chosen = np.array(list(itertools.product(scales, repeat=count)), np.float64)
    return np.column_stack([chosen, 1.0 - chosen.sum(1)])


def greedy_soup(count: int, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the means that a greedy soup passes through (Wortsman et al. 2022, recipe 1).

    The networks come in the order of their own scores; each joins the mean if that does not make it
    worse. Scores that are not finite rank last, and a mean with such a score is not taken.

    Args:
        score: of coefficients [T, count], lower is better; called once for the networks alone and
            once per candidate.

    Returns:
        what was scored, in that order, [T, count].

    Raises:
        ModeconnError: none of the networks has a finite score.
    """
    seen = [*np.eye(count)]
    alone = score(np.eye(count))
    first, *others = ranking.order(alone).tolist()
    members, best = [first], float(alone[ranking.best(alone, "the score of the networks alone")])
    for candidate in others:
        seen.append(np.isin(np.arange(count), [*members, candidate]) / (len(members) + 1))
        value = float(score(seen[-1][None])[0])
        if math.isfinite(value) and value <= best:
            members, best = [*members, candidate], value
    return np.array(seen)


def _limit(count: int) -> None:
    if count > MOST:
        raise ModeconnError(f"that makes {count:,} mixtures: expected at most {MOST:,}")
