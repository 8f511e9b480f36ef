"""A rule for curves of data that cannot be sampled: gaps that may hide a hump are halved."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from modeconn.evaluation.adaptive.searches import Goal, Known

# Evenly spaced points to begin with, those that one pass is asked for, and all of them.
FIRST, _PER_PASS, MOST = 9, 4, 40
# What a hump between two points may add: this share of the spread of the values around them, for
# a gap as wide as the first ones.
_UNSEEN = 0.5


@dataclass
class GuidedSearch:
    """Halves the gaps between points in which the curve may rise above its best value.

    Args:
        breaks: points where the curve may have a kink, evaluated at the beginning.
        goal: how exact the maximum is to be.
        chord: whether the rise above the straight line between the ends is searched for.
    """

    breaks: np.ndarray
    goal: Goal
    chord: bool = False
    stopped: str = ""
    _asked: int = field(default=0, init=False)

    def propose(self, known: Known) -> list[float]:
        """Return points to evaluate next, none where the maximum is found."""
        if self.stopped:
            return []
        if not len(known.t):
            return self._taken(np.union1d(np.linspace(0.0, 1.0, FIRST), self.breaks))
        if not np.isfinite(known.values).all():
            self.stopped = "a value is not finite"
            return []
        curve = known.above_chord() if self.chord else known
        most = max(MOST, FIRST + len(self.breaks) + _PER_PASS)
        hopes = hopes_of(curve)
        worth = np.flatnonzero(hopes > curve.values.max() + self.goal.least(curve.height))
        if not len(worth) or self._asked >= most:
            self.stopped = f"after {self._asked} points" if len(worth) else "settled"
            return []
        chosen = worth[np.argsort(-hopes[worth], kind="stable")]
        chosen = chosen[: min(_PER_PASS, most - self._asked)]
        return self._taken((curve.t[chosen] + curve.t[chosen + 1]) / 2)

    def _taken(self, points: np.ndarray) -> list[float]:
        self._asked += len(points)
        return [float(t) for t in points]


def hopes_of(curve: Known) -> np.ndarray:
    """Return the most that a smooth curve may reach in each gap between its known points, [T-1].

    Tangents and parabolas through the points around a gap are prolonged into it; a share of the
    spread around it stands for humps that no point has met.
    """
    gaps = np.diff(curve.t)
    hopes = [_hope(curve, gap, gaps) for gap in range(len(gaps))]
    return np.array(hopes)


def _hope(curve: Known, gap: int, gaps: np.ndarray) -> float:
    t, v = curve.t, curve.values
    around = v[max(gap - 1, 0) : gap + 3]
    ends = max(v[gap], v[gap + 1])
    unseen = _UNSEEN * np.ptp(around) * min(1.0, gaps[gap] * (FIRST - 1))
    found = [ends + unseen, _tangents(curve, gap)]
    for first in (gap - 1, gap):
        if first >= 0 and first + 2 < len(t):
            part = slice(first, first + 3)
            bend, slope, level = np.polyfit(t[part] - t[gap], v[part], 2)
            top = -slope / (2 * bend) if bend < 0 else -1.0
            if 0 <= top <= gaps[gap]:
                found.append(level + slope * top / 2)
    return float(max(found))


def _tangents(curve: Known, gap: int) -> float:
    """Return where the lines through the points on both sides of a gap meet above it."""
    t, v = curve.t, curve.values
    width, left, right = t[gap + 1] - t[gap], v[gap], v[gap + 1]
    into = (left - v[gap - 1]) / (t[gap] - t[gap - 1]) if gap else None
    after = (v[gap + 2] - right) / (t[gap + 2] - t[gap + 1]) if gap + 2 < len(t) else None
    top = max(left, right)
    if into is not None and after is not None:
        if into > after:
            meet = (right - left - after * width) / (into - after)
            if 0 <= meet <= width:
                top = max(top, left + into * meet)
    elif into is not None:
        top = max(top, left + into * width)
    elif after is not None:
        top = max(top, right - after * width)
    return float(top)
