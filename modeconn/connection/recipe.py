"""Recipes: the settings by which subnetworks are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modeconn.errors import ModeconnError

_OPTIMIZERS = ("adamw", "sgd")
_SCHEDULES = ("constant", "cosine", "onecycle", "step")
# "onecycle": the part of the steps that the rate rises over, and the rate that it rises from, as a
# fraction of the largest: the usual shape of a one-cycle schedule, with a short rise.
_RISE = 0.2
_FIRST_RATE = 0.04


@dataclass(frozen=True)
class Recipe:
    """Settings of a training of subnetworks.

    Attributes:
        optimizer: "adamw" (β = 0.9, 0.99), or "sgd" with Nesterov momentum as in Nguyen et al.
            2021, section 5.
        schedule: of the learning rate: "constant", "cosine" down to 0, "onecycle" (up over the
            first fifth, then down), or "step" (times `decay` after every `every` epochs).
        stop_loss, stop_error: a subnetwork is finished once its loss (error) over all training data
            is at most this, and the rest train on.
        min_epochs: no stop before more than so many epochs.
        stop_together: all subnetworks of a training are finished as soon as one is, as the fully
            connected ones of Nguyen et al. 2021 are: its results then depend on each other.
    """

    optimizer: str = "adamw"
    lr: float = 1e-3
    momentum: float = 0.95
    weight_decay: float = 0.0
    batch_size: int = 128
    epochs: int = 20
    schedule: str = "cosine"
    stop_loss: float | None = None
    stop_error: float | None = None
    every: int = 20
    decay: float = 0.5
    min_epochs: int = 0
    stop_together: bool = False

    def check(self) -> None:
        """Raises a ModeconnError for a setting out of range."""
        if self.optimizer not in _OPTIMIZERS:
            raise ModeconnError(
                f"optimizer is {self.optimizer!r}: expected one of {', '.join(_OPTIMIZERS)}"
            )
        if self.schedule not in _SCHEDULES:
            raise ModeconnError(
                f"schedule is {self.schedule!r}: expected one of {', '.join(_SCHEDULES)}"
            )
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ModeconnError(f"lr is {self.lr}: expected a positive number")
        if self.every < 1 or not 0 < self.decay <= 1:
            raise ModeconnError(
                f"every is {self.every} and decay {self.decay}: "
                "expected a number of epochs, at least 1, and a factor above 0, at most 1"
            )
        if self.epochs < 0 or self.batch_size < 1:
            raise ModeconnError(
                f"epochs is {self.epochs} and batch_size {self.batch_size}: "
                "expected at least 0 and 1"
            )

    def rate(self, step: int, steps: int) -> float:
        """Returns the learning rate of one of so many steps."""
        if self.schedule == "constant":
            return self.lr
        at = step / max(1, steps)
        if self.schedule == "step":
            return self.lr * self.decay ** (step * self.epochs // max(1, steps) // self.every)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * at))
        if at < _RISE:
            rising = 0.5 * (1 - math.cos(math.pi * at / _RISE))
            return self.lr * (_FIRST_RATE + (1 - _FIRST_RATE) * rising)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (at - _RISE) / (1 - _RISE)))
