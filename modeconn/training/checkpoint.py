"""The state of an unfinished training, kept in ``<checkpoint>.training``.

A `modeconn.resuming.Record`: the model's parameters and buffers under ``model.``, the momentum
buffers under ``momentum.``, and the epoch. No pickle, so a file from elsewhere cannot run code.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.parameters import state
from modeconn.resuming import Record


@dataclass(frozen=True)
class Settings:
    """All that decides the weights after a given number of epochs.

    `network` is the digest of the architecture: classes, their code and attributes, and the names
    and shapes of parameters.
    """

    lr: float
    momentum: float
    nesterov: bool
    batch_size: int
    weight_decay: float
    seed: int
    samples: int
    data_crc: int
    network: str
    halve_every: int = 0

    def check(self) -> None:
        """Raise a ModeconnError for a setting outside its range."""
        ranges: list[tuple[str, float, bool, str]] = [
            ("lr", self.lr, math.isfinite(self.lr) and self.lr > 0, "a positive number"),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0"),
            ("halve_every", self.halve_every, self.halve_every >= 0, "at least 0"),
            ("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
        ]
        for name, value, good, expected in ranges:
            if not good:
                raise ModeconnError(f"{name} is {value}: expected {expected}")

    def described(self) -> dict[str, Any]:
        """Return the settings that a reader understands: all but the digests."""
        digests = ("data_crc", "network")
        return {name: value for name, value in asdict(self).items() if name not in digests}


@dataclass(frozen=True)
class Snapshot:
    """A training after a whole number of epochs.

    Attributes:
        epoch: how many epochs; 0 before the first.
        error: fraction of errors seen during the last of them; 1 before the first.
        weights: the model's state dict, a copy.
        momentum: momentum buffer by parameter name, a copy; empty before the first step.
        network: digest of the architecture.
    """

    epoch: int
    error: float
    weights: dict[str, torch.Tensor]
    momentum: dict[str, torch.Tensor]
    network: str


def training_file(checkpoint: str | os.PathLike[str]) -> Path:
    """Return the name of the file that keeps an unfinished training of a checkpoint."""
    return Path(f"{os.fspath(checkpoint)}.training")


def record_of(checkpoint: str | os.PathLike[str] | None, settings: Settings) -> Record:
    """Return the record of a training; without a checkpoint, it keeps nothing."""
    file = None if checkpoint is None else training_file(checkpoint)
    # In a list, as a checksum says nothing to a reader of the message that names differences.
    return Record(
        file, "unfinished training", {**settings.described(), "data": [settings.data_crc]}
    )


def save(snapshot: Snapshot, record: Record) -> None:
    """Write a training, whole or not at all."""
    tensors = {f"model.{key}": value for key, value in snapshot.weights.items()}
    tensors |= {f"momentum.{key}": value for key, value in snapshot.momentum.items()}
    about = {"epoch": snapshot.epoch, "error": snapshot.error, "network": snapshot.network}
    record.write(tensors, about)


def load(record: Record) -> Snapshot:
    """Read the training that a record keeps.

    Raises:
        ModeconnError: nothing is kept, or a training with other settings.
    """
    if not record.exists:
        raise ModeconnError(f"{record.file}: no such file, so there is no training to resume")
    tensors, kept = record.read()
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "momentum": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise _damaged(record, f"{key!r} is neither of the model nor of the momentum")
        parts[part][name] = tensor
    epoch, error = kept.get("epoch"), kept.get("error")
    if type(epoch) is not int or epoch < 1:
        raise _damaged(record, f"epoch is {epoch!r}, expected a whole number of at least 1")
    if type(error) is not float or not 0 <= error <= 1:
        raise _damaged(record, f"error is {error!r}, expected a fraction from 0 to 1")
    return Snapshot(epoch, error, parts["model"], parts["momentum"], str(kept.get("network")))


def check(snapshot: Snapshot, model: nn.Module, settings: Settings, record: Record) -> None:
    """Raise a ModeconnError unless a snapshot is of this network.

    Its momentum is that of some of the parameters: those that never had a gradient have none.
    """
    own = model.state_dict()
    state.match([own, snapshot.weights], ["the model", str(record.file)], devices=False)
    if snapshot.network != settings.network:
        raise ModeconnError(
            f"{record.file} holds the training of another network with such weights: "
            "remove it to start anew, or name another file"
        )
    parameters = dict(model.named_parameters()) if settings.momentum else {}
    for name, tensor in snapshot.momentum.items():
        parameter = parameters.get(name)
        kind = None if parameter is None else (parameter.shape, parameter.dtype)
        if kind != (tensor.shape, tensor.dtype):
            raise _damaged(record, f"the momentum of {name!r} is of no parameter")


def _damaged(record: Record, reason: str) -> ModeconnError:
    return ModeconnError(
        f"{record.file} is damaged: {reason}: remove it to start anew, or name another file"
    )
