"""What rounding does to the outputs at every breakpoint of a path, and between them.

Rewrites change dead units alone, so the breakpoints that they join have one bound. Between the ends
of a swing the bound is convex in t. On a shift the derivatives are polynomials in t: their values
at Chebyshev points, times the Lebesgue constant, bound them (Trefethen 2019, theorem 15.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modeconn.connection.rounding import Sensitivity
from modeconn.connection.segment_kinds import REWRITE, SHIFT, Evidence
from modeconn.connection.structure import Structure
from modeconn.parameters.blending import blend

State = Mapping[str, Tensor]


class PathRounding:
    """The bounds of a path's breakpoints, for rows at a time.

    Args:
        structure: of the network. points: the breakpoints. evidence: of the segments.
    """

    def __init__(
        self, structure: Structure, points: Sequence[State], evidence: Sequence[Evidence]
    ) -> None:
        self._structure, self._points = structure, points
        self._groups = _groups([found.kind for found in evidence])
        self._shifts = {
            k: max(1, len(found.moved)) for k, found in enumerate(evidence) if found.kind == SHIFT
        }

    def of_rows(self, x: Tensor) -> Sequence[Sensitivity | None]:
        """Returns the bound of each breakpoint, that of a shift at both of its ends."""
        of_group: dict[int, Sensitivity | None] = {}
        for k, group in enumerate(self._groups):
            if group not in of_group:
                of_group[group] = self._structure.rounding(self._points[k], x)
        for k, moved in self._shifts.items():
            between = self._of_shift(k, moved, x)
            for group in self._groups[k : k + 2]:
                of_group[group] = _larger(of_group[group], between)
        return [of_group[group] for group in self._groups]

    def _of_shift(self, k: int, moved: int, x: Tensor) -> Sensitivity | None:
        start, stop = self._points[k], self._points[k + 1]
        sizes = {
            key: torch.maximum(value.abs(), stop[key].abs()) if value.is_floating_point() else value
            for key, value in start.items()
        }
        total: Tensor | None = None
        for t in _chebyshev(moved):
            state = {
                key: blend([v, stop[key]], [1 - t, t]) if v.is_floating_point() else v
                for key, v in start.items()
            }
            found = self._structure.rounding(state, x, sizes)
            if found is None:
                return None
            total = found.roundoffs if total is None else total + found.roundoffs
        assert total is not None
        # Each |∂z/∂pre| is at most this many times the largest of its values at the points, and the
        # largest at most their sum.
        return Sensitivity(total * (1 + 2 / math.pi * math.log(moved + 1)))


def _chebyshev(degree: int) -> list[float]:
    """Returns the Chebyshev points of [0, 1] that fix a polynomial of a degree."""
    angles = [math.pi * (2 * j + 1) / (2 * degree + 2) for j in range(degree + 1)]
    return [0.5 - 0.5 * math.cos(angle) for angle in angles]


def _groups(kinds: Sequence[str]) -> list[int]:
    """Numbers the breakpoints; those that rewrites join have one number."""
    groups = [0]
    for kind in kinds:
        groups.append(groups[-1] + (kind != REWRITE))
    return groups


def _larger(a: Sensitivity | None, b: Sensitivity | None) -> Sensitivity | None:
    if a is None or b is None:
        return None
    return Sensitivity(torch.maximum(a.roundoffs, b.roundoffs))
