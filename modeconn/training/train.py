"""Training to zero error: plain SGD with Nesterov momentum, deterministic, interruptible, resumable.

Interrupted or killed at any moment, then resumed, a training gives bitwise the weights of one that
ran through (same machine, versions and number of threads): each epoch's shuffle depends on (seed,
epoch) alone, and weights, buffers and momentum are all in the training state.
"""

from __future__ import annotations

import enum
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modeconn.data import datasets
from modeconn.errors import ModeconnError
from modeconn.parameters import state
from modeconn.training import checkpoint as training_state
from modeconn.training.checkpoint import Settings, Snapshot

Labelled = tuple[torch.Tensor, torch.Tensor]
Progress = Callable[[int, int], None]

# The exact error needs a pass of its own, so it is measured once the error seen while training is
# this small.
NEARLY_NO_ERROR = 0.005
# Weights are copied after each epoch but written at most this often: short epochs do not wait for
# the disk.
SECONDS_BETWEEN_SAVES = 5.0
EVALUATION_ROWS = 1000


class Stopped(str, enum.Enum):
    """Why a training ended; the value is the text to show."""

    ZERO_ERROR = "zero training error"
    EPOCHS = "all epochs done"

    __str__ = str.__str__


@dataclass(frozen=True)
class Epoch:
    """What `log` is told after each epoch: the mean loss and error of the batches as they were trained on."""

    epoch: int
    epochs: int
    loss: float
    error: float
    seconds: float


@dataclass(frozen=True)
class TrainReport:
    """How a training ended.  Losses are means per sample, errors are fractions, both of the final weights."""

    epochs: int
    loss: float
    error: float
    test_loss: float | None
    test_error: float | None
    seconds: float
    stopped: Stopped


def train(
    model: nn.Module,
    data: datasets.Images | Labelled,
    *,
    test: datasets.Images | Labelled | None = None,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    batch_size: int = 100,
    epochs: int = 200,
    seed: int = 0,
    weight_decay: float = 0.0,
    halve_every: int = 0,
    stop_at_zero_error: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    log: Callable[[Epoch], None] | None = None,
) -> TrainReport:
    """Train a classifier in place with SGD and cross-entropy, from the weights that it has.

    Args:
        model: maps inputs ``[N, …]`` to logits ``[N, C]``.  It is trained on the device that it is
            on.
        data: a data set of :mod:`modeconn.data.datasets`, or ``(inputs, targets)`` tensors with
            integer targets ``[N]``.  Kept whole in memory (float32).
        test: data whose loss and error go into the report.
        lr, momentum, nesterov, weight_decay: those of :class:`torch.optim.SGD`.
        halve_every: the learning rate is half as large after every so many epochs; 0 for a constant
            one.
        batch_size: samples per step; the last step of an epoch takes what is left.
        epochs: the most epochs to train, those before a resume included.
        seed: decides the order of the samples (and dropout), not the initial weights.
        stop_at_zero_error: stop after the first epoch whose weights classify all training samples
            correctly.
        checkpoint: a safetensors file for the final weights, written when the training is finished.
            Until then the training state is in ``<checkpoint>.training`` beside it, whose last
            whole version survives a crash at any moment.
        resume: continue from ``<checkpoint>.training``; settings (but `epochs`) and data must be
            the same.
        metadata: text added to the checkpoint's metadata.
        progress: called with (epochs done, `epochs`).
        log: called after every epoch.

    Returns:
        How it ended, and loss and error of the final weights, each from a pass over all of `data`
            and `test`.

    Raises:
        ModeconnError: for a setting out of range, data that does not fit the model, a training
            state that is missing, already there, broken or made with other settings, or a loss that
            is no longer finite.
        KeyboardInterrupt: with a message that says what was saved.  The model then has the weights
            of the last finished epoch.
    """
    started = time.perf_counter()
    if epochs < 1:
        raise ModeconnError(f"epochs is {epochs}, expected at least 1")
    labelled, labelled_test = _preload(data, model), None if test is None else _preload(test, model)
    settings = Settings(
        lr,
        momentum,
        nesterov and momentum > 0,
        batch_size,
        weight_decay,
        seed,
        len(labelled[1]),
        _crc(labelled),
        halve_every,
    )
    settings.check()
    _check_fits(model, labelled)
    file = None if checkpoint is None else training_file(checkpoint)
    loop = _Loop(model, settings, epochs, file, stop_at_zero_error, progress, log)
    loop.begin(resume)
    try:
        stopped = loop.run(labelled)
        loss, error = measure(model, labelled)
        test_loss, test_error = (
            (None, None) if labelled_test is None else measure(model, labelled_test)
        )
        seconds = time.perf_counter() - started
        report = TrainReport(loop.last.epoch, loss, error, test_loss, test_error, seconds, stopped)
        if checkpoint is not None:
            state.save(state.load(model), checkpoint, _describe(settings, report, metadata))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(loop.interrupted()) from None
    if loop.file is not None:
        loop.file.unlink(missing_ok=True)
    return report


def training_file(checkpoint: str | os.PathLike[str]) -> Path:
    """Where the state of an unfinished training of this checkpoint is."""
    return Path(f"{os.fspath(checkpoint)}.training")


def measure(model: nn.Module, data: Labelled) -> tuple[float, float]:
    """Mean cross-entropy and fraction of errors over ``(inputs [N, …], targets [N])``, in evaluation mode."""
    loss, wrong = torch.zeros((), dtype=torch.float64), 0
    with _mode(model, training=False), torch.no_grad():
        for inputs, targets in zip(
            *(tensor.split(EVALUATION_ROWS) for tensor in data), strict=True
        ):
            logits = model(inputs)
            loss += (
                nn.functional.cross_entropy(logits, targets, reduction="none").double().sum().cpu()
            )
            wrong += int((logits.argmax(1) != targets).sum())
    return float(loss) / len(data[1]), wrong / len(data[1])


class _Loop:
    """The epochs of one training, and what is needed to go on after the last of them."""

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        epochs: int,
        file: Path | None,
        stop_at_zero_error: bool,
        progress: Progress | None,
        log: Callable[[Epoch], None] | None,
    ) -> None:
        self.model, self.settings, self.epochs, self.file = model, settings, epochs, file
        self.stop_at_zero_error, self.progress, self.log = stop_at_zero_error, progress, log
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )
        self.last = self._snapshot(0, 1.0)
        self._saved_at = -math.inf

    def begin(self, resume: bool) -> None:
        """Take up a saved training, or make sure that starting a new one loses none."""
        if resume:
            if self.file is None:
                raise ModeconnError("resume needs a checkpoint to resume from")
            saved = training_state.load(self.file, self.settings)
            state.match(
                [state.load(self.model), saved.weights],
                ["the model", str(self.file)],
                devices=False,
            )
            self._restore(saved)
            if self.last.epoch > self.epochs:
                raise ModeconnError(
                    f"{self.file} has {self.last.epoch} epochs, more than epochs = {self.epochs}"
                )
        elif self.file is not None and self.file.exists():
            raise ModeconnError(
                f"{self.file} holds an unfinished training: resume it, or delete it to start anew"
            )

    def run(self, data: Labelled) -> Stopped:
        """Train until there is a reason to stop."""
        while not self._at_zero_error(data):
            if self.last.epoch == self.epochs:
                return Stopped.EPOCHS
            self._epoch(data)
        return Stopped.ZERO_ERROR

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
            if self.file is not None:
                self.file.unlink(missing_ok=True)  # going on from it would diverge again
            raise ModeconnError(
                f"the loss is {loss} in epoch {number}: lr {self.settings.lr} is too large for this model"
            )
        self.last = self._snapshot(number, error)
        if time.perf_counter() - self._saved_at >= SECONDS_BETWEEN_SAVES:
            self._save()
        if self.log is not None:
            self.log(Epoch(number, self.epochs, loss, error, time.perf_counter() - began))
        if self.progress is not None:
            self.progress(number, self.epochs)

    def _steps(self, data: Labelled, number: int) -> tuple[float, float]:
        inputs, targets = data
        seed = (
            int(
                np.random.SeedSequence([self.settings.seed, number]).generate_state(1, np.uint64)[0]
            )
            >> 1
        )
        if self.settings.halve_every:
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * 0.5 ** ((number - 1) // self.settings.halve_every)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed)).to(
            targets.device
        )
        loss_sum = torch.zeros((), dtype=torch.float64, device=targets.device)
        wrong = torch.zeros((), dtype=torch.int64, device=targets.device)
        with _mode(self.model, training=True), torch.random.fork_rng(_gpus(targets.device)):
            # for dropout and the like, which draw from the global generator
            torch.manual_seed(seed)
            for rows in order.split(self.settings.batch_size):
                logits, wanted = self.model(inputs[rows]), targets[rows]
                loss = nn.functional.cross_entropy(logits, wanted)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                loss_sum += loss.detach() * len(rows)
                wrong += (logits.detach().argmax(1) != wanted).sum()
        return float(loss_sum) / len(targets), int(wrong) / len(targets)

    def _snapshot(self, epoch: int, error: float) -> Snapshot:
        buffers = {
            name: self.optimizer.state[parameter]["momentum_buffer"].clone()
            for name, parameter in self.model.named_parameters()
            if self.optimizer.state[parameter].get("momentum_buffer") is not None
        }
        weights = {key: value.clone() for key, value in self.model.state_dict().items()}
        return Snapshot(epoch, error, weights, buffers)

    def _restore(self, snapshot: Snapshot) -> None:
        self.model.load_state_dict(snapshot.weights)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state.pop(parameter, None)
            if name in snapshot.momentum:
                self.optimizer.state[parameter]["momentum_buffer"] = (
                    snapshot.momentum[name].to(parameter.device).clone()
                )
        self.last = snapshot

    def _save(self) -> None:
        if self.file is not None:
            training_state.save(self.last, self.settings, self.file)
            self._saved_at = time.perf_counter()

    def interrupted(self) -> str:
        """Go back to the last finished epoch, save what there is to save, and say so."""
        self._restore(self.last)
        if self.last.epoch == 0:
            return "interrupted in the first epoch, nothing was saved"
        if self.file is None:
            return f"interrupted; the model has the weights after epoch {self.last.epoch}"
        self._save()
        return f"interrupted; {self.file} keeps the training up to epoch {self.last.epoch}, to resume from there"


def _preload(data: datasets.Images | Labelled, model: nn.Module) -> Labelled:
    """All inputs and targets as tensors on the model's device."""
    if isinstance(data, datasets.Images):
        inputs, targets = data.slice(0, len(data))
    else:
        inputs, targets = data
    first = next(model.parameters(), None)
    if first is None:
        raise ModeconnError(f"{type(model).__name__} has no parameters to train")
    if len(inputs) != len(targets) or not len(targets):
        raise ModeconnError(
            f"data has {len(inputs)} inputs and {len(targets)} targets, expected as many, at least one"
        )
    return inputs.to(first.device), targets.to(first.device)


def _gpus(device: torch.device) -> list[torch.device]:
    return [] if device.type == "cpu" else [device]


def _crc(data: Labelled) -> int:
    """A checksum of the data, to notice a resume with another data set or normalisation."""
    value = 0
    for tensor in data:
        value = zlib.crc32(tensor.detach().cpu().contiguous().numpy().data.cast("B"), value)
    return value


def _check_fits(model: nn.Module, data: Labelled) -> None:
    """Raise ModeconnError where the model cannot take the inputs, or its outputs do not match the targets."""
    inputs, targets = data
    shape = list(inputs.shape[1:])
    try:
        with _mode(model, training=False), torch.no_grad():
            logits = model(inputs[:2])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModeconnError(
            f"the model does not take inputs of shape {shape} per sample: {reason}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise ModeconnError(
            f"the model returns {getattr(logits, 'shape', type(logits))}, expected logits [N, classes]"
        )
    if targets.dim() != 1 or targets.dtype != torch.int64:
        raise ModeconnError(
            f"targets are {targets.dtype} {list(targets.shape)}, expected int64 class numbers [N]"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[1]:
        raise ModeconnError(
            f"labels run from {low} to {high}, but the model has {logits.shape[1]} outputs"
        )


def _describe(
    settings: Settings, report: TrainReport, metadata: Mapping[str, str] | None
) -> dict[str, str]:
    """The metadata of a finished checkpoint: how it was made, and how good it is."""
    made = {key: str(value) for key, value in asdict(settings).items() if key != "data_crc"}
    results = {
        key: str(value)
        for key, value in asdict(report).items()
        if value is not None and key != "seconds"
    }
    return {**made, **results, **(metadata or {})}


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or evaluation mode, and each module back in its own mode afterwards."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
