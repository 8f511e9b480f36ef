"""Rules that ask for points of one curve until its largest value is found.

A rule knows the values at the points so far, and proposes further ones. What it finds is a value
that the curve takes: a lower bound of its maximum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

# Points on all data that one rule asks for at most, how many of them the climb at the end has, and
# those that each further rule adds: rules of one evaluation share their points.
MOST, CLIMB, FURTHER = 24, 4, 4
# Points that one pass is asked for by one rule.
_PER_PASS = 3
# Standard errors of the parts' mean that a guess may be too low by.
_ERRORS = 2.0
# Widths in t: between the first points, between others, of a point that says all around it, within
# which a known value takes uncertainty away, and of the smoothing of the standard error.
_FIRST, _OTHERS, _SAME, _REACH, _SMOOTH = 0.025, 0.015, 0.004, 0.1, 0.04
# Segments of a chain from which on those widths shrink: one hump a segment stays separate.
_SEGMENTS = 12
# A climb ends where its steps are no longer numbers between two points.
_SHORTEST = 1e-7
_TINY = 1e-12


@dataclass(frozen=True)
class Goal:
    """States how exact a maximum is to be.

    Attributes:
        tolerance: of the height, by which the largest value rises above the lower end.
        floor: the least that counts, whatever the height.
    """

    tolerance: float = 0.01
    floor: float = 1e-4

    def least(self, height: float) -> float:
        """Return the least rise above the best value that is worth another point."""
        return max(self.tolerance * height, self.floor)


@dataclass
class Known:
    """Values of one curve on all data, t rising."""

    t: np.ndarray
    values: np.ndarray

    @property
    def best(self) -> int:
        """The place of the largest value; NaN counts as largest."""
        return int(self.values.argmax())

    @property
    def height(self) -> float:
        """By how much the largest value is above the lower one of the ends."""
        return max(float(self.values.max() - min(self.values[0], self.values[-1])), _TINY)

    def at(self, t: float) -> float | None:
        """Return the value at a point, None where it is unknown."""
        near = np.flatnonzero(np.abs(self.t - t) < _SHORTEST)
        return float(self.values[near[0]]) if len(near) else None

    def above_chord(self) -> Known:
        """Return what the values rise above the straight line between the ends by."""
        return Known(self.t, self.values - self.chord(self.t))

    def chord(self, t: np.ndarray) -> np.ndarray:
        """Return the straight line between the ends."""
        line: np.ndarray = (1 - t) * self.values[0] + t * self.values[-1]
        return line


@dataclass
class Budget:
    """The points on all data that the rules of one evaluation may ask for together."""

    most: int = MOST
    asked: int = 0


class Search(Protocol):
    """A rule for one curve."""

    stopped: str

    def propose(self, known: Known) -> list[float]:
        """Return points to evaluate next, none where the maximum is found."""


def unit_of(segments: int) -> float:
    """Return the factor of all widths in t for a chain of so many segments."""
    return min(1.0, _SEGMENTS / max(segments, 1))


@dataclass
class PartsSearch:
    """Two random parts of the data say where all data are worth a point.

    The guess is the parts' mean, moved to pass through the values on all data; half of the parts'
    difference is its standard error. Where guess and error may top the best value, all data are
    evaluated; then steps are halved around the best point.

    Args:
        t: points of the parts, rising.
        one, other: their values, [T].
        goal: how exact the maximum is to be.
        unit: factor of the widths in t.
        budget: of points, shared with other rules.
        chord: whether the rise above the straight line between the ends is searched for.
    """

    t: np.ndarray
    one: np.ndarray
    other: np.ndarray
    goal: Goal
    budget: Budget
    unit: float = 1.0
    chord: bool = False
    stopped: str = ""
    _climbed: int = field(default=0, init=False)
    _step: float = field(init=False)

    def __post_init__(self) -> None:
        self._step = float(np.median(np.diff(self.t))) / 2
        self.mean = (self.one + self.other) / 2
        with np.errstate(invalid="ignore"):
            squares = ((self.one - self.other) / 2) ** 2
        # inf - inf, where both parts are infinite: their points come first in any case
        squares = np.where(np.isfinite(squares), squares, 0.0)
        apart = (self.t[:, None] - self.t[None]) / (_SMOOTH * self.unit)
        weights = np.exp(-0.5 * apart**2)
        self.error = np.sqrt((weights * squares).sum(1) / weights.sum(1))

    def first(self) -> list[float]:
        """Return the ends and the highest, well separated points of the parts."""
        inner = (self.t > 0) & (self.t < 1)
        picked = self._separate(np.where(inner, self.mean, -np.inf), _FIRST, _PER_PASS)
        return [0.0, 1.0, *picked]

    def propose(self, known: Known) -> list[float]:
        """Return points to evaluate next, none where the maximum is found."""
        if self.stopped:
            return []
        if not len(known.t):
            return self.first()
        if not np.isfinite(known.values).all():
            self.stopped = "a value is not finite"
            return []
        left = self.budget.most - CLIMB - self.budget.asked
        promising = self._promising(known)
        if promising and left > 0:
            return promising[:left]
        found = self._around(known.above_chord() if self.chord else known)
        if not found and promising:  # the cap came first
            self.stopped = f"after {self.budget.asked} points"
        return found

    def _promising(self, known: Known) -> list[float]:
        """Return where the guess and its error may top the best value by what counts."""
        offset = known.values - np.interp(known.t, self.t, self.mean)
        guess = self.mean + np.interp(self.t, known.t, offset)
        if self.chord:
            guess, known = guess - known.chord(self.t), known.above_chord()
        distance = np.abs(self.t[:, None] - known.t[None]).min(1)
        near = np.minimum(1.0, distance / (_REACH * self.unit))
        top = guess + _ERRORS * self.error * near
        best = known.values.max() + self.goal.least(known.height)
        worth = (top > best) & (distance >= _SAME * self.unit)
        return self._separate(np.where(worth, top, -np.inf), _OTHERS, _PER_PASS)

    def _separate(self, heights: np.ndarray, width: float, most: int) -> list[float]:
        """Return the highest points, each some width from those before; -inf is none."""
        picked: list[float] = []
        for index in np.argsort(-np.nan_to_num(heights, nan=np.inf), kind="stable"):
            t = float(self.t[index])
            if len(picked) == most or heights[index] == -np.inf:
                break
            if all(abs(t - other) > width * self.unit for other in picked):
                picked.append(t)
        return picked

    def _around(self, known: Known) -> list[float]:
        """Return the neighbours of the best point, at ever smaller steps, until it is resolved."""
        # a rule that others took the points from still has some steps of its own
        while self.budget.asked < self.budget.most or self._climbed < 2 * CLIMB:
            t = float(known.t[known.best])
            inside = [q for q in (t - self._step, t + self._step) if 0 <= q <= 1]
            new = [q for q in inside if known.at(q) is None]
            if new:
                self._climbed += len(new)
                return new
            if self._resolved(known, t) or self._step < _SHORTEST:
                self.stopped = "settled"
                return []
            self._step /= 2
        self.stopped = f"after {self.budget.asked} points"
        return []

    def _resolved(self, known: Known, t: float) -> bool:
        """Whether a parabola through the best point and its neighbours leaves nothing to find."""
        top = float(known.values[known.best])
        left, right = known.at(t - self._step), known.at(t + self._step)
        if left is None or right is None:  # at an end
            return True
        bend = 2 * top - left - right
        remaining = (left - right) ** 2 / (8 * bend) if bend > 0 else 0.0
        steep = top - min(left, right) >= 0.25 * known.height
        return remaining <= self.goal.least(known.height) and not steep


@dataclass
class BreakPoints:
    """The points between which a curve is known to be constant or convex: they are enough."""

    points: np.ndarray
    stopped: str = ""

    def propose(self, known: Known) -> list[float]:
        """Return the break points, once."""
        if self.stopped:
            return []
        self.stopped = "exact: constant or convex between break points"
        return [float(t) for t in self.points]
