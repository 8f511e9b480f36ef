"""Training to zero error: SGD with Nesterov momentum, deterministic, interruptible, resumable.

Interrupted or killed at any moment, then resumed, a training gives bitwise the weights of one that
ran through (same machine, versions and number of threads): each epoch's shuffle depends on (seed,
epoch) alone, and weights, buffers and momentum are all in the training state.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from torch import nn

from modeconn.backends.precision import without_autocast
from modeconn.data import datasets
from modeconn.errors import ModeconnError
from modeconn.files.fingerprints import digest_of
from modeconn.files.writing import locked
from modeconn.parameters import state
from modeconn.training.checkpoint import Settings, record_of, training_file
from modeconn.training.labelled import Labelled, check_fits, checksum, measure, preload
from modeconn.training.loop import Epoch, Loop, Progress, Stopped


@dataclass(frozen=True)
class TrainReport:
    """The outcome of a training: loss per sample and fraction of errors of the final weights."""

    epochs: int
    loss: float
    error: float
    test_loss: float | None
    test_error: float | None
    seconds: float
    stopped: Stopped


@without_autocast
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
        model: maps inputs ``[N, …]`` to logits ``[N, C]``. It is trained on the device that it is
            on.
        data: a data set of :mod:`modeconn.data.datasets`, or ``(inputs, targets)`` tensors with
            integer targets ``[N]``. Kept whole in memory (float32).
        test: data whose loss and error go into the report.
        lr: the learning rate of :class:`torch.optim.SGD`.
        momentum: its momentum.
        nesterov: whether that is Nesterov's.
        weight_decay: its weight decay.
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
        How it ended, with loss and error of the final weights over all of `data` and `test`.

    Raises:
        ModeconnError: a setting is out of range; data do not fit the model; a training state is
            missing, already there, broken or made with other settings; the loss is no longer
            finite.
        KeyboardInterrupt: with a message that says what was saved. The model then has the weights
            of the last finished epoch.
    """
    if epochs < 1:
        raise ModeconnError(f"epochs is {epochs}: expected at least 1")
    labelled = preload(data, model)
    labelled_test = None if test is None else preload(test, model)
    settings = Settings(
        lr=lr,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
        samples=len(labelled[1]),
        data_crc=checksum(labelled),
        network=digest_of(model, weights=False),
        halve_every=halve_every,
    )
    settings.check()
    check_fits(model, labelled)
    with locked(None if checkpoint is None else training_file(checkpoint)):
        record = record_of(checkpoint, settings)
        loop = Loop(model, settings, epochs, record, stop_at_zero_error, progress, log)
        loop.begin(resume)
        return _trained(loop, labelled, labelled_test, checkpoint, metadata)


def _trained(
    loop: Loop,
    data: Labelled,
    test: Labelled | None,
    checkpoint: str | os.PathLike[str] | None,
    metadata: Mapping[str, str] | None,
) -> TrainReport:
    """Run the epochs, measure, and write the finished checkpoint."""
    started = time.perf_counter()
    model, record = loop.model, loop.record
    try:
        stopped = loop.run(data)
        loss, error = measure(model, data)
        test_loss, test_error = (None, None) if test is None else measure(model, test)
        seconds = time.perf_counter() - started
        report = TrainReport(loop.last.epoch, loss, error, test_loss, test_error, seconds, stopped)
        if checkpoint is not None:
            about = _metadata(loop.settings, report, metadata)
            state.save(state.load(model), checkpoint, about)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(loop.interrupted()) from None
    record.remove()
    return report


def _metadata(
    settings: Settings, report: TrainReport, more: Mapping[str, str] | None
) -> dict[str, str]:
    """Return the metadata of a finished checkpoint: its settings and its quality."""
    made = {key: str(value) for key, value in settings.described().items()}
    results = {
        key: str(value)
        for key, value in asdict(report).items()
        if value is not None and key != "seconds"
    }
    return {**made, **results, **(more or {})}
