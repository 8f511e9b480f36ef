"""Recipes: the settings by which subnetworks are trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modeconn.errors import ModeconnError

_OPTIMIZERS = ("adamw", "sgd")
_SCHEDULES = ("constant", "cosine", "onecycle", "halve")
# Epochs between two halvings of the learning rate, as the paper has it for VGG.
_HALVING = 10
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
            first fifth, then down), or "halve" (half as large after every 10 epochs).
        stop_loss, stop_error: a subnetwork is finished once its loss (error) over all training data
            is at most this.
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
        if self.schedule == "halve":
            return self.lr * 0.5 ** (step * self.epochs // max(1, steps) // _HALVING)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * at))
        if at < _RISE:
            rising = 0.5 * (1 - math.cos(math.pi * at / _RISE))
            return self.lr * (_FIRST_RATE + (1 - _FIRST_RATE) * rising)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (at - _RISE) / (1 - _RISE)))
