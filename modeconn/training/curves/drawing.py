"""The t of a fit's steps: uniform, or where the loss along the curve is high."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from modeconn.parameters.paths import Path

# Bins of [0, 1] with a moving mean of the losses each, the weight of a new loss in it, the share of
# the overall mean that every bin gets, and the steps before the means are used.
_BINS, _NEW, _SHARE, _STEPS = 16, 0.1, 0.1, 100
DRAWS = ("importance", "uniform")


@dataclass
class Drawing:
    """Draws a t for each step; what it draws follows from the seed, the step and the losses.

    With "importance", a bin of [0, 1] is drawn in proportion to its moving mean loss, plus a tenth
    of the overall mean, so that the highest part of a curve is trained most.

    Args:
        kind: "importance" or "uniform".
        seed: of the fit.

    Attributes:
        means: moving mean loss of each bin.
    """

    kind: str
    seed: int
    means: np.ndarray = field(default_factory=lambda: np.ones(_BINS))

    def at(self, step: int) -> float:
        """Return the t of a step, counted from 0."""
        draws = np.random.default_rng([self.seed, step])
        if self.kind == "uniform" or step <= _STEPS:
            return float(draws.random())
        weights = self.means + _SHARE * self.means.mean()
        index = draws.choice(_BINS, p=weights / weights.sum())
        return float((index + draws.random()) / _BINS)

    def on(self, path: Path, step: int) -> tuple[Tensor, float]:
        """Return the coefficients of a path's control points at the t of a step, and that t."""
        t = self.at(step)
        return path.coefficients([t])[0], t

    def add(self, t: float, loss: float) -> None:
        """Take note of the loss at a t; one below 0, which some losses have, counts as 0."""
        index = min(int(t * _BINS), _BINS - 1)
        self.means[index] += _NEW * (max(loss, 0.0) - self.means[index])
        if not self.means.any():
            self.means[:] = 1.0
