"""Networks, data and directions for Landscaper, and plain PyTorch by its rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


def conv() -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Unflatten(2, (4, 1)), Wide(), *layers).eval()


class Wide(nn.Module):
    """[N, 1, 4, 1] to images [N, 1, 4, 4]."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.5, 1.5, 4)


def data(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(20, width, generator=generator), torch.arange(20) % 3


def directions(model: nn.Module, count: int, complex_: bool = False) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    dtype = torch.complex64 if complex_ else torch.float32
    return [
        [torch.randn(p.shape, generator=generator, dtype=dtype) for p in model.parameters()]
        for _ in range(count)
    ]


def cross_entropy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return nn.functional.cross_entropy(model(data[0]), data[1]).item()


def over_batches(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """A scalar that is no loss: the greatest logit, batch by batch."""
    return max(model(x).max().item() for x in data[0].split(7))


def landscape(
    model: nn.Module,
    data: Any,
    dirs: Sequence[Sequence[Tensor]],
    scalar_fn: Callable[[nn.Module, Any], float],
    steps: int,
    distance: float,
    dim: int,
) -> np.ndarray:
    """The values by the rules, without noise on the greatest."""
    weights = [p.detach().clone() for p in model.parameters()]
    norm = sum(p.square().sum() for p in weights).sqrt()
    scaled = []
    for direction in dirs[:dim]:
        alike = [d * p.numel() ** 0.5 / (d.norm() + 1e-10) for d, p in zip(direction, weights)]
        length = sum(d.square().sum() for d in alike).sqrt()
        scaled.append([d * (norm * distance / (steps / 2)) / length for d in alike])
    values = np.zeros([steps] * dim)
    for place in itertools.product(range(steps), repeat=dim):
        with torch.no_grad():
            for i, (p, w) in enumerate(zip(model.parameters(), weights)):
                p.copy_(w + sum((k - steps // 2) * d[i] for k, d in zip(place, scaled)))
            values[place] = scalar_fn(model, data)
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights):
            p.copy_(w)
    return values
