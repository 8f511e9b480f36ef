"""All that decides the control points after a given number of steps, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from modeconn.errors import ModeconnError
from modeconn.training.curves.drawing import DRAWS

# Curves between two networks.
KINDS = ("bezier", "polychain")


@dataclass(frozen=True)
class FitSettings:
    """The plain values of a fit; digests are of data, network, starting points and callables."""

    kind: str
    bends: int
    steps: int
    lr: float
    batch_size: int
    t: str
    weight_decay: float
    seed: int
    samples: int
    regulariser: float = 0.0
    digests: Mapping[str, str] | None = None

    def check(self) -> None:
        """Raise a ModeconnError for a setting outside its range.

        Kind, bends and steps have been checked by what made them.
        """
        for name in ("batch_size", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ModeconnError(f"{name} is {value!r}: expected a whole number")
        ranges: list[tuple[str, float, bool, str]] = [
            ("lr", self.lr, math.isfinite(self.lr) and self.lr > 0, "a positive number"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        ]
        for name, value, good, expected in ranges:
            if not good:
                raise ModeconnError(f"{name} is {value}: expected {expected}")
        if self.t not in DRAWS:
            raise ModeconnError(f't is {self.t!r}: expected "importance" or "uniform"')

    def described(self) -> dict[str, Any]:
        """Return the settings as a record of an unfinished fit keeps them."""
        plain = {name: value for name, value in asdict(self).items() if name != "digests"}
        # in lists, as a digest says nothing to a reader of the message that names differences
        return plain | {name: [value] for name, value in (self.digests or {}).items()}


def rate_at(step: int, steps: int) -> float:
    """Return the factor of the learning rate: 1 for half of the steps, then down to 0.01 at 90 %.

    That is the schedule of Garipov et al. 2018 for curves.
    """
    part = step / steps
    return 1.0 if part <= 0.5 else max(0.01, 1.0 - (part - 0.5) / 0.4 * 0.99)
