"""The epochs of a training with SGD, deterministic, interruptible and resumable."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.resuming import Record
from modeconn.training import checkpoint as training_state
from modeconn.training.checkpoint import Settings, Snapshot
from modeconn.training.labelled import Labelled, measure, mode
from modeconn.training.order import devices_that_draw, order_of_epoch, seed_of

# Called with (epochs done, epochs in all).
Progress = Callable[[int, int], None]

# The exact error needs a pass of its own, so it is measured once the error seen while training is
# this small.
NEARLY_NO_ERROR = 0.005


class Stopped(str, enum.Enum):
    """Why a training ended; the value is the text to show."""

    ZERO_ERROR = "zero training error"
    EPOCHS = "all epochs done"

    __str__ = str.__str__


@dataclass(frozen=True)
class Epoch:
    """A finished epoch: mean loss and error of its batches, each as it was before its step."""

    epoch: int
    epochs: int
    loss: float
    error: float
    seconds: float


class Loop:
    """The epochs of one training, and the snapshot after the last of them.

    Args:
        model: trained in place.
        settings: of the optimizer and the batches.
        epochs: the most epochs, those before a resume included.
        record: keeps the last snapshot while the training is unfinished.
        stop_at_zero_error: whether to stop once all training samples are classified correctly.
        progress: called with (epochs done, `epochs`).
        log: called after every epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        epochs: int,
        record: Record,
        stop_at_zero_error: bool,
        progress: Progress | None,
        log: Callable[[Epoch], None] | None,
    ) -> None:
        self.model, self.settings, self.epochs, self.record = model, settings, epochs, record
        self.stop_at_zero_error, self.progress, self.log = stop_at_zero_error, progress, log
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )
        self.last = self._snapshot(0, 1.0)

    def begin(self, resume: bool) -> None:
        """Continue a saved training, or check that a new one overwrites none.

        Raises:
            ModeconnError: there is none to continue, or one that would be lost; it has other
                settings, another model or more epochs.
        """
        file = self.record.file
        if not resume:
            if self.record.exists:
                raise ModeconnError(
                    f"{file} holds an unfinished training: resume it, or delete it to start anew"
                )
            return
        if file is None:
            raise ModeconnError("resume needs a checkpoint to resume from")
        saved = training_state.load(self.record)
        training_state.check(saved, self.model, self.settings, self.record)
        self._restore(saved)
        if self.last.epoch > self.epochs:
            raise ModeconnError(
                f"{file} has {self.last.epoch} epochs, more than epochs = {self.epochs}"
            )

    def run(self, data: Labelled) -> Stopped:
        """Train until there is a reason to stop."""
        while not self._at_zero_error(data):
            if self.last.epoch == self.epochs:
                return Stopped.EPOCHS
            self._epoch(data)
        return Stopped.ZERO_ERROR

    def interrupted(self) -> str:
        """Go back to the last finished epoch, save it, and return what there is to say."""
        self._restore(self.last)
        if self.last.epoch == 0:
            return "interrupted in the first epoch, nothing was saved"
        if self.record.file is None:
            return f"interrupted; the model has the weights after epoch {self.last.epoch}"
        training_state.save(self.last, self.record)
        return (
            f"interrupted; {self.record.file} keeps the training up to epoch {self.last.epoch}, "
            "to resume from there"
        )

    def _at_zero_error(self, data: Labelled) -> bool:
        # Depends only on what a snapshot holds, so that a resumed training stops where it would
        # have stopped.
        return (
            self.stop_at_zero_error
            and self.last.error < NEARLY_NO_ERROR
            and measure(self.model, data)[1] == 0
        )

    def _epoch(self, data: Labelled) -> None:
        began, number = time.perf_counter(), self.last.epoch + 1
        loss, error = self._steps(data, number)
        if not math.isfinite(loss):
            self.record.remove()  # going on from it would diverge again
            raise ModeconnError(
                f"the loss is {loss} in epoch {number}: "
                f"lr {self.settings.lr} is too large for this model"
            )
        self.last = self._snapshot(number, error)
        # Weights are copied after each epoch, and written now and then: short epochs do not wait
        # for the disk.
        if self.record.due:
            training_state.save(self.last, self.record)
        if self.log is not None:
            self.log(Epoch(number, self.epochs, loss, error, time.perf_counter() - began))
        if self.progress is not None:
            self.progress(number, self.epochs)

    def _steps(self, data: Labelled, number: int) -> tuple[float, float]:
        """Take the steps of one epoch; return the mean loss and error of its batches."""
        inputs, targets = data
        seed = seed_of(self.settings.seed, number)
        if self.settings.halve_every:
            halvings = (number - 1) // self.settings.halve_every
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * 0.5**halvings
        order = order_of_epoch(seed, len(targets))
        loss_sum = torch.zeros((), dtype=torch.float64, device=targets.device)
        wrong = torch.zeros((), dtype=torch.int64, device=targets.device)
        with mode(self.model, training=True), torch.random.fork_rng(
            devices_that_draw(targets.device)
        ):
            # for dropout and the like, which draw from the global generator
            torch.manual_seed(seed)
            for rows in order.to(targets.device).split(self.settings.batch_size):
                logits, labels = self.model(inputs[rows]), targets[rows]
                loss = nn.functional.cross_entropy(logits, labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                loss_sum += loss.detach() * len(rows)
                wrong += (logits.detach().argmax(1) != labels).sum()
        return float(loss_sum) / len(targets), int(wrong) / len(targets)

    def _snapshot(self, epoch: int, error: float) -> Snapshot:
        buffers = {}
        for name, parameter in self.model.named_parameters():
            buffer = self.optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                buffers[name] = buffer.clone()
        weights = {key: value.clone() for key, value in self.model.state_dict().items()}
        return Snapshot(epoch, error, weights, buffers, self.settings.network)

    def _restore(self, snapshot: Snapshot) -> None:
        self.model.load_state_dict(snapshot.weights)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state.pop(parameter, None)
            if name in snapshot.momentum:
                buffer = snapshot.momentum[name].to(parameter.device).clone()
                self.optimizer.state[parameter]["momentum_buffer"] = buffer
        self.last = snapshot
