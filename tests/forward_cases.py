"""Networks and paths that the tests of mc.forward share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.parameters.paths import Path
from naive import clone, mlp


def conv(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def chain() -> tuple[nn.Sequential, mc.PolyChain]:
    """Rewrite dead units, swing the last layer over to them, and rewrite the others."""
    model = mlp(7, 10, 12, 4, seed=1)
    points = [clone(model)]
    points[0]["4.weight"][:, 6:] = 0
    rewritten = clone(points[0])
    rewritten["2.weight"][6:] = torch.randn(6, 10)
    swung = clone(rewritten)
    swung["4.weight"] = torch.cat([torch.zeros(4, 6), torch.randn(4, 6)], 1)
    swung["4.bias"] = torch.randn(4)
    again = clone(swung)
    again["2.weight"][:6] = 0
    again["2.bias"][:6] = 1
    return model, mc.PolyChain([*points, rewritten, swung, again])


# A network, a path, and inputs.
KINDS: dict[str, Callable[[], tuple[nn.Module, Path, Tensor]]] = {
    "mlp": lambda: (
        mlp(7, 9, 4),
        mc.Bezier([mlp(7, 9, 4, seed=k) for k in range(3)]),
        torch.randn(5, 7),
    ),
    "conv": lambda: (conv(0), mc.Line(conv(0), conv(1)), torch.randn(5, 3, 8, 8)),
    "chain": lambda: (*chain(), torch.randn(5, 7)),
}
