"""Strategies that search a path for its best point: each asks for rows of t, and is told scores.

A strategy is a generator: it yields points [B, dim], is sent their scores [B], lower is better, and
ends when it has no more to ask. What it asks follows from its arguments and the scores alone, so
that a search is continued by telling it again what was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from modeconn.errors import ModeconnError
from modeconn.parameters import mixtures, ranking
from modeconn.parameters.paths import Mixture, Path

Strategy = Generator[np.ndarray, np.ndarray, None]
# Rows of a pass by default: so many cost little more than one where much is shared.
_ROWS = 64
# The first step of CMA-ES, as a share of the range.
_SIGMA = 0.25


@dataclass(frozen=True)
class Space:
    """The points that a search chooses from.

    Attributes:
        low, high: the range of each coordinate, [dim].
        sums: how many coordinates add up to 1 each, 0 where they are free: coefficients of a
            mixture, once for each of its groups.
    """

    low: np.ndarray
    high: np.ndarray
    sums: int = 0

    @classmethod
    def of(cls, path: Path) -> Space:
        """Return the space of a path: weights that sum to 1, or coordinates within its extent."""
        if isinstance(path, Mixture):
            return cls(np.zeros(path.dim), np.ones(path.dim), len(path.control_points))
        extent = np.array(getattr(path, "extent", [(0.0, 1.0)] * path.dim), np.float64)
        return cls(extent[:, 0], extent[:, 1])

    @property
    def dim(self) -> int:
        """The number of coordinates."""
        return len(self.low)

    @property
    def groups(self) -> int:
        """The number of times that coordinates add up to 1."""
        return self.dim // self.sums if self.sums else 0

    def scaled(self, unit: np.ndarray) -> np.ndarray:
        """Return the points for coordinates in [0, 1]; weights are divided by their sums."""
        if not self.sums:
            points: np.ndarray = self.low + unit * (self.high - self.low)
            return points
        weights = unit.reshape(len(unit), -1, self.sums)
        totals = weights.sum(2, keepdims=True)
        mean = np.full_like(weights, 1.0 / self.sums)
        divided = np.where(totals > 0, weights / np.where(totals > 0, totals, 1.0), mean)
        rows: np.ndarray = divided.reshape(len(unit), -1)
        return rows


def random_points(space: Space, budget: int, batch: int | None, seed: int) -> Strategy:
    """Ask for the middle, then for points drawn uniformly."""
    rng = np.random.default_rng(seed)
    rows = space.scaled(np.full((1, space.dim), 0.5))
    if space.sums:
        drawn = rng.dirichlet(np.ones(space.sums), (budget, space.groups)).reshape(budget, -1)
    else:
        drawn = space.scaled(rng.random((budget, space.dim)))
    yield from _in_parts(np.concatenate([rows, drawn])[:budget], batch)


def grid_points(space: Space, budget: int, batch: int | None, seed: int) -> Strategy:
    """Ask for the finest grid that the budget has room for.

    Raises:
        ModeconnError: there is room for the corners not even.
    """
    steps = 0
    while _grid_size(space, steps + 1) <= budget:
        steps += 1
    if not steps:
        raise ModeconnError(
            f"budget is {budget}: the coarsest grid has {_grid_size(space, 1):,} points; expected "
            'as many, or strategy "random" or "cma"'
        )
    if space.sums:
        parts = [mixtures.simplex_grid(space.sums, steps)] * space.groups
    else:
        parts = [
            np.linspace(low, high, steps + 1)[:, None] for low, high in zip(space.low, space.high)
        ]
    places = np.meshgrid(*(np.arange(len(part)) for part in parts), indexing="ij")
    columns = [part[place.ravel()] for part, place in zip(parts, places)]
    yield from _in_parts(np.concatenate(columns, axis=1), batch)


def greedy_points(space: Space, budget: int, batch: int | None, seed: int) -> Strategy:
    """Ask for the networks alone, then for means: a greedy soup (Wortsman et al. 2022, recipe 1).

    Raises:
        ModeconnError: the path is no mixture whose networks move as one.
    """
    if space.groups != 1:
        raise ModeconnError('strategy "greedy" is for a Mixture without groups')
    count = space.dim
    alone = yield np.eye(count)[:budget]
    first, *others = ranking.order(alone).tolist()
    members, best = [first], float(alone[ranking.best(alone, "the score of the networks alone")])
    for candidate in others[: max(budget - count, 0)]:
        together = [*members, candidate]
        score = yield (np.isin(np.arange(count), together) / len(together))[None]
        if math.isfinite(score[0]) and score[0] <= best:
            members, best = together, float(score[0])


def cma_points(space: Space, budget: int, batch: int | None, seed: int) -> Strategy:
    """Ask for generations of CMA-ES (Hansen & Ostermeier 2001), by the package cmaes.

    Weights of a mixture are sought as numbers in [0, 1], which are divided by their sum.

    Raises:
        ModeconnError: cmaes is not installed, or there is one coordinate only.
    """
    try:
        from cmaes import CMA  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ModeconnError(
            'strategy "cma" needs cmaes, which is not installed: pip install "modeconn[search]"'
        ) from None
    if space.dim < 2:
        raise ModeconnError('strategy "cma" needs two coordinates or more: expected "grid"')
    optimizer = CMA(
        mean=np.full(space.dim, 0.5),
        sigma=_SIGMA,
        bounds=np.tile([0.0, 1.0], (space.dim, 1)),
        seed=seed,
        population_size=batch,
    )
    left = budget
    while left > 0 and not optimizer.should_stop():
        unit = np.array([optimizer.ask() for _ in range(optimizer.population_size)])
        scores = yield space.scaled(unit)[:left]
        left -= len(unit)
        if left >= 0:  # it ranks them: what is not finite comes last
            told = np.nan_to_num(scores, nan=np.inf, posinf=np.finfo(np.float64).max)
            optimizer.tell([*zip(unit, np.minimum(told, np.finfo(np.float64).max))])


STRATEGIES: dict[str, Callable[[Space, int, int | None, int], Strategy]] = {
    "random": random_points,
    "grid": grid_points,
    "greedy": greedy_points,
    "cma": cma_points,
}


def _in_parts(rows: np.ndarray, batch: int | None) -> Strategy:
    size = batch or _ROWS
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _grid_size(space: Space, steps: int) -> int:
    if not space.sums:
        return int((steps + 1) ** space.dim)
    return int(math.comb(steps + space.sums - 1, space.sums - 1) ** space.groups)
