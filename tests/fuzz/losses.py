"""Losses of random cases, with targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fuzz.draw import Draw


def draw_loss(draw: Draw, rows: int, classes: int, seed: int) -> tuple[Any, Tensor]:
    kind = draw.pick(["cross_entropy", "cross_entropy", "mse", "bce", "callable"])
    generator = torch.Generator().manual_seed(seed)
    if kind == "cross_entropy":
        return kind, torch.randint(0, classes, (rows,), generator=generator)
    if kind == "bce":
        return kind, torch.randint(0, 2, (rows, classes), generator=generator).float()
    return (absolute if kind == "callable" else kind), torch.randn(
        rows, classes, generator=generator
    )


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean absolute error of each row."""
    return (outputs - targets).abs().mean(1)
