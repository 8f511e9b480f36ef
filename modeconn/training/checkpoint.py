"""The state of an unfinished training, as it is kept in ``<checkpoint>.training``.

A safetensors file: the model's entries under ``model.``, the momentum buffers under ``momentum.``,
and one metadata entry ``training`` of JSON text.  No pickle, so a file from elsewhere cannot run
code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from modeconn.errors import ModeconnError
from modeconn.parameters import state

FORMAT = "modeconn.training/1"


@dataclass(frozen=True)
class Settings:
    """All that decides the weights after a given number of epochs; a resumed training must have the same."""

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
        """Raise ModeconnError for a setting outside its range."""
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
                raise ModeconnError(f"{name} is {value}, expected {expected}")

    def check_same(self, saved: Mapping[str, Any], file: Path) -> None:
        """Raise ModeconnError where a saved training was made with other settings or data."""
        for name, mine in asdict(self).items():
            if saved.get(name) != mine:
                what = (
                    "other data" if name == "data_crc" else f"{name} {saved.get(name)}, not {mine}"
                )
                raise ModeconnError(f"{file} cannot be resumed: it was started with {what}")


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


def save(snapshot: Snapshot, settings: Settings, file: Path) -> None:
    """Write a training state, whole or not at all."""
    about = {
        "format": FORMAT,
        "epoch": snapshot.epoch,
        "error": snapshot.error,
        "settings": asdict(settings),
    }
    tensors = {f"model.{key}": value for key, value in snapshot.weights.items()}
    tensors |= {f"momentum.{key}": value for key, value in snapshot.momentum.items()}
    state.save(tensors, file, {"training": json.dumps(about)})


def load(file: Path, settings: Settings) -> Snapshot:
    """The training saved in `file`, checked against the settings that are to go on with it."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ModeconnError(f"{file}: no such file, so there is no training to resume")
    try:
        with safe_open(file, framework="pt") as archive:
            about = json.loads((archive.metadata() or {})["training"])
            tensors = {key: archive.get_tensor(key) for key in archive.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModeconnError(
            f"{file} is not a training state: {type(error).__name__}: {error}"
        ) from error
    if about.get("format") != FORMAT:
        raise ModeconnError(f"{file} has format {about.get('format')!r}, expected {FORMAT!r}")
    settings.check_same(about["settings"], file)
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "momentum": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    return Snapshot(about["epoch"], about["error"], parts["model"], parts["momentum"])
