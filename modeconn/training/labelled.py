"""Labelled data in memory, on a model's device: read, checked against the model, measured."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from modeconn.data import datasets
from modeconn.errors import ModeconnError, out_of_memory

# Inputs [N, …] and integer targets [N].
Labelled = tuple[torch.Tensor, torch.Tensor]

# Rows of a pass that measures: its activations fit in memory for any model that can be trained.
_ROWS = 1000


def preload(data: datasets.Images | Labelled, model: nn.Module) -> Labelled:
    """Return all inputs and targets as tensors on the model's device.

    Raises:
        ModeconnError: the model has no parameters, or inputs and targets are not as many.
    """
    inputs, targets = data.slice(0, len(data)) if isinstance(data, datasets.Images) else data
    first = next(model.parameters(), None)
    if first is None:
        raise ModeconnError(f"{type(model).__name__} has no parameters to train")
    if len(inputs) != len(targets) or not len(targets):
        raise ModeconnError(
            f"data has {len(inputs)} inputs and {len(targets)} targets: "
            "expected as many, at least one"
        )
    return inputs.to(first.device), targets.to(first.device)


def check_fits(model: nn.Module, data: Labelled) -> None:
    """Raise a ModeconnError unless the model takes the inputs and has an output for each target."""
    inputs, targets = data
    shape = list(inputs.shape[1:])
    try:
        with mode(model, training=False), torch.no_grad():
            logits = model(inputs[:2])
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if out_of_memory(error):
            raise
        reason = str(error).strip().split("\n")[0]
        raise ModeconnError(
            f"the model does not take inputs of shape {shape} per sample: {reason}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        found = getattr(logits, "shape", type(logits))
        raise ModeconnError(f"the model returns {found}: expected logits [N, classes]")
    if targets.dim() != 1 or targets.dtype != torch.int64:
        raise ModeconnError(
            f"targets are {targets.dtype} {list(targets.shape)}: expected int64 class numbers [N]"
        )
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or high >= logits.shape[1]:
        raise ModeconnError(
            f"labels run from {low} to {high}: "
            f"expected 0 to {logits.shape[1] - 1}, as the model has {logits.shape[1]} outputs"
        )


def checksum(data: Labelled) -> int:
    """Return a checksum of all inputs and targets, as they are after normalization."""
    value = 0
    for tensor in data:
        value = zlib.crc32(tensor.detach().cpu().contiguous().numpy().data.cast("B"), value)
    return value


def measure(model: nn.Module, data: Labelled) -> tuple[float, float]:
    """Measure mean cross-entropy and fraction of errors over labelled data, in evaluation mode."""
    loss, wrong = torch.zeros((), dtype=torch.float64), 0
    inputs, targets = data
    with mode(model, training=False), torch.no_grad():
        for x, y in zip(inputs.split(_ROWS), targets.split(_ROWS), strict=True):
            logits = model(x)
            losses = nn.functional.cross_entropy(logits, y, reduction="none")
            loss += losses.double().sum().cpu()
            wrong += int((logits.argmax(1) != y).sum())
    return float(loss) / len(targets), wrong / len(targets)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put the model in training or evaluation mode, and each module back in its own afterwards."""
    before = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
