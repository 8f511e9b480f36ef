"""The steps of a fit: deterministic, interruptible and resumable.

A step draws coefficients of the control points, and takes the gradient of a batch's mean loss at
the network that they make. What it draws follows from the seed and the step (order.py), so that a
fit which is resumed ends at bitwise the same control points as one that ran through.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.data.inputs import Inputs, apply
from modeconn.errors import ModeconnError
from modeconn.resuming import Record
from modeconn.training.curves.objective import Objective
from modeconn.training.curves.settings import FitSettings, rate_at
from modeconn.training.curves.working import Working
from modeconn.training.order import devices_that_draw, order_of_epoch, seed_of

# Entries of the history of a fit, each the mean over as many steps.
_HISTORY = 100
# The drawing of a step: coefficients of the control points [K], and what messages call their t.
Draw = Callable[[int], "tuple[Tensor, float | list[float]]"]
Seen = Callable[[Any, float], None]
Optimizers = Callable[[list[Tensor]], torch.optim.Optimizer]


class Diverged(ModeconnError):
    """A loss is not finite.

    Attributes:
        points: parameters of all control points before the step, [K, P].
    """

    points: Tensor


@dataclass
class Samples:
    """All data in memory, with the order of a seed; a batch is no larger than they are."""

    inputs: Inputs
    labels: Tensor
    batch_size: int
    seed: int
    _epoch: int = -1
    _order: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        self.per_epoch = len(self.labels) // self.batch_size

    def batch(self, step: int) -> tuple[Inputs, Tensor]:
        """Return the batch of a step; what is left of an epoch's samples is left out."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            order = order_of_epoch(seed_of(self.seed, epoch + 1), len(self.labels))
            self._epoch, self._order = epoch, order.to(self.labels.device)
        rows = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        return apply(lambda tensor: tensor[rows], self.inputs), self.labels[rows]


@dataclass(eq=False)
class FitLoop:
    """The steps of one fit.

    Attributes:
        working: the network, at the point of the step.
        points: parameters of all control points, [K, P]; those in `free` are trained in place.
        free: which of them are trained, without gaps.
        objective: mean loss of outputs and labels.
        samples: the data.
        settings: of the fit.
        draw: coefficients of a step.
        seen: called with what was drawn and the loss.
        record: keeps an unfinished fit.
        extra: of the points, added to the loss; differentiable.
        augment: of a batch's inputs.
        moving: arrays that change with the steps, besides points and the optimizer's.
        history: steps, mean loss and learning rate of each hundredth of the fit.
    """

    working: Working
    points: Tensor
    free: slice
    objective: Objective
    samples: Samples
    settings: FitSettings
    draw: Draw
    seen: Seen
    record: Record
    optimizers: Optimizers
    extra: Callable[[Tensor], Tensor] | None = None
    augment: Callable[[Inputs], Inputs] | None = None
    moving: dict[str, np.ndarray] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self.trained = self.points[self.free].detach()
        self.trained.requires_grad_(True)
        self.trained.grad = torch.zeros_like(self.trained)
        self.optimizer = self.optimizers([self.trained])
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._sum, self._steps, self._whole = 0.0, 0, True

    def begin(self, resume: bool) -> None:
        """Continue a kept fit, or check that a new one overwrites none.

        Raises:
            ModeconnError: there is none to continue, or one that would be lost, or another.
        """
        file = self.record.file
        if not resume:
            if self.record.exists:
                raise ModeconnError(
                    f"{file} holds an unfinished fit: resume it, or delete it to start anew"
                )
            return
        if file is None:
            raise ModeconnError("resume needs a checkpoint to resume from")
        if not self.record.exists:
            raise ModeconnError(f"{file}: no such file, so there is no fit to resume")
        self._restore(*self.record.read())

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Take the steps that are left.

        Raises:
            Diverged: a loss or a gradient is not finite; what is kept is the state before the step.
        """
        steps, device = self.settings.steps, self.points.device
        with torch.random.fork_rng(devices_that_draw(device)):
            while self.step < steps:
                # for dropout and augmentation, which draw from the global generator
                torch.manual_seed(seed_of(self.settings.seed, self.step))
                self._take()
                if self.record.due:
                    self.write()
                progress(self.step, steps)

    def interrupted(self) -> str:
        """Keep what is done, and return what there is to say."""
        if self.record.file is None or not self.step:
            return f"interrupted after {self.step} steps, nothing was saved"
        if self._whole:  # else what was written last is whole
            self.write()
        return f"interrupted; {self.record.file} keeps the fit, to resume from there"

    def write(self) -> None:
        """Write the state: points, what the optimizer keeps, means and history."""
        tensors = {"points": self.trained.detach()}
        numbers: dict[str, Any] = {}
        for name, value in self.optimizer.state[self.trained].items():
            (tensors if isinstance(value, Tensor) else numbers)[f"optimizer.{name}"] = value
        tensors |= {f"moving.{k}": torch.from_numpy(v) for k, v in self.moving.items()}
        state = {"step": self.step, "sum": [self._sum, self._steps], "history": self.history}
        self.record.write(tensors, state | {"optimizer": numbers})

    def _restore(self, tensors: dict[str, Tensor], kept: dict[str, Any]) -> None:
        with torch.no_grad():
            self.trained.copy_(tensors["points"])
        state = {k.removeprefix("optimizer."): v for k, v in kept["optimizer"].items()}
        for name, value in tensors.items():
            part, _, name = name.partition(".")
            if part == "moving":
                self.moving[name][:] = value.numpy()
            elif part == "optimizer":
                # a counter that PyTorch keeps on the CPU stays there
                state[name] = value.to(self.points.device) if value.dim() else value
        self.optimizer.state[self.trained].update(state)
        self.step, self.history = kept["step"], kept["history"]
        self._sum, self._steps = kept["sum"]

    def _take(self) -> None:
        """Take one step."""
        coefficients, t = self.draw(self.step)
        inputs, labels = self.samples.batch(self.step)
        if self.augment is not None:
            inputs = self.augment(inputs)
        working, c = self.working, coefficients.to(self.points)
        torch.mv(self.points.t(), c, out=working.vector)
        loss = float(working.loss(inputs, labels, self.objective))
        gradient = working.gradient
        self._check_finite(loss, t)
        if self.settings.weight_decay:
            gradient.add_(working.vector, alpha=self.settings.weight_decay)
        assert self.trained.grad is not None
        torch.outer(c[self.free], gradient, out=self.trained.grad)
        if self.extra is not None:
            self._add_extra()
        factor = rate_at(self.step, self.settings.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * factor
        self._whole = False
        self.optimizer.step()
        self.seen(t, loss)
        self.step += 1
        self._note(loss, factor)
        self._whole = True

    def _add_extra(self) -> None:
        """Add the gradient of what is added to the loss."""
        assert self.extra is not None and self.trained.grad is not None
        points = self.points.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(self.extra(points), points)
        self.trained.grad.add_(found[self.free])

    def _check_finite(self, loss: float, t: float | list[float]) -> None:
        total = self.working.gradient.sum()
        if math.isfinite(loss) and (
            bool(total.isfinite()) or bool(self.working.gradient.isfinite().all())
        ):
            return
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        where = f"{t:.4g}" if isinstance(t, float) else t
        place = ""
        if self.record.file is not None and self.step:
            self.write()
            place = f"; {self.record.file} keeps the points before that step"
        error = Diverged(
            f"{what} at step {self.step} (t = {where}): expected finite numbers; lr "
            f"{self.settings.lr} is too large for this network{place}"
        )
        error.points = self.points.detach().clone()
        raise error

    def _note(self, loss: float, factor: float) -> None:
        self._sum, self._steps = self._sum + loss, self._steps + 1
        every = max(1, self.settings.steps // _HISTORY)
        if self._steps == every or self.step == self.settings.steps:
            mean, rate = self._sum / self._steps, self.rates[0] * factor
            self.history.append({"step": self.step, "loss": mean, "lr": rate})
            self._sum, self._steps = 0.0, 0
