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

from modeconn.errors import ModeconnError
from modeconn.resuming import Record


@dataclass(frozen=True)
class Settings:
    """All that decides the weights after a given number of epochs."""

    lr: float
    momentum: float
    nesterov: bool
    batch_size: int
    weight_decay: float
    seed: int
    samples: int
    data_crc: int
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
        """Return the settings that a reader understands: all but the checksum of the data."""
        return {name: value for name, value in asdict(self).items() if name != "data_crc"}


@dataclass(frozen=True)
class Snapshot:
    """A training after a whole number of epochs.

    Attributes:
        epoch: how many epochs; 0 before the first.
        error: fraction of errors seen during the last of them; 1 before the first.
        weights: the model's state dict, a copy.
        momentum: momentum buffer by parameter name, a copy; empty before the first step.
    """

    epoch: int
    error: float
    weights: dict[str, torch.Tensor]
    momentum: dict[str, torch.Tensor]


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
    record.write(tensors, {"epoch": snapshot.epoch, "error": snapshot.error})


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
        parts[part][name] = tensor
    return Snapshot(kept["epoch"], kept["error"], parts["model"], parts["momentum"])
