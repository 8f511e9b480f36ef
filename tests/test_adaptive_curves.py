"""Adaptive points against dense grids: a transformer on text, a convolutional network on spirals.

The rule was found on other networks and data (perceptrons, VGG and ResNet on images); these are for
its test alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modeconn as mc
from modeconn import models

pytestmark = [pytest.mark.slow, pytest.mark.proof]

# Points of the truth, and the share of a maximum's height that may be missed.
DENSE, MISS, FLOOR = 201, 0.01, 1e-4


def text() -> torch.Tensor:
    """Characters of Python's own source, [1000, 24]."""
    source = Path(json.decoder.__file__).read_bytes() + Path(json.encoder.__file__).read_bytes()
    codes = torch.tensor(list(source)) % 64
    starts = torch.randperm(len(codes) - 24, generator=torch.Generator().manual_seed(0))[:1000]
    return torch.stack([codes[start : start + 24] for start in starts.tolist()])


def spirals() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy signals of five frequencies, [3000, 1, 32], and which of them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 5
    phase = 6.28 * torch.rand(3000, 1, generator=generator)
    wave = torch.sin((labels[:, None] + 1) * torch.linspace(0, 6.28, 32) + phase)
    return (wave + 0.8 * torch.randn(3000, 32, generator=generator))[:, None], labels


def transformer() -> nn.Module:
    return models.build("gpt:vocab=64,context=24,width=32,layers=2,heads=2")


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(1, 12, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool1d(2),
        nn.Conv1d(12, 16, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(256, 5),
    )


def trained(make, x, y, loss, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = make()
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(250):
        rows = torch.randint(len(x), (128,), generator=torch.Generator().manual_seed(step))
        adam.zero_grad()
        loss(net(x[rows]), y[rows]).backward()
        adam.step()
    return net.eval().requires_grad_(False)


def next_token(outputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    outputs = getattr(outputs, "logits", outputs)
    return F.cross_entropy(outputs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def paths(nets: list[nn.Module]) -> dict[str, mc.Line | mc.Bezier | mc.PolyChain]:
    a, b, c = (net.state_dict() for net in nets)
    far = {k: 2.5 * v for k, v in c.items()}
    near = {k: 0.97 * v + 0.03 * b[k] for k, v in a.items()}
    return {
        "line": mc.Line(a, b),
        "another line": mc.Line(b, c),
        "near": mc.Line(a, near),
        "curve": mc.Bezier([a, c, b]),
        "far bend": mc.Bezier([a, far, b]),
        "two bends": mc.Bezier([a, far, c, b]),
        "chain": mc.PolyChain([a, b, c]),
        "chain of 5": mc.PolyChain([a, c, near, b, far, a]),
        "detour": mc.PolyChain([a, near, far, near, a, near, a, near, a, near]),
    }


def cases(kind: str):
    if kind == "transformer":
        x = text()
        nets = [trained(transformer, x, x, next_token, seed) for seed in range(3)]
        return nets, (x, x), {"loss": "next_token", "metrics": ("loss", "error")}
    x, y = spirals()
    return [trained(convolutional, x, y, F.cross_entropy, s) for s in range(3)], (x, y), {}


@pytest.mark.parametrize("kind", ["transformer", "convolutional"])
def test_no_maximum_is_missed(kind, capsys):
    nets, data, more = cases(kind)
    counts, misses = [], []
    for name, path in paths(nets).items():
        dense = mc.evaluate(nets[0], path, data, DENSE, **more)
        coarse = mc.evaluate(nets[0], path, data, 101, **more)
        found = mc.evaluate(nets[0], path, data, "adaptive", **more)
        counts.append(len(found.t))
        for metric in ("loss", "error"):
            truth = dense.metric(metric)
            height = truth.max() - min(truth[0], truth[-1])
            miss, grids = (truth.max() - r.metric(metric).max() for r in (found, coarse))
            misses.append(miss <= max(MISS * height, FLOOR))
            with capsys.disabled():
                print(
                    f"{kind} {name:12} {metric:5} height {height:.3g}: {len(found.t)} points, "
                    f"{found.passes} passes, missed {100 * miss / height:.2f} % "
                    f"(101 points: {100 * grids / height:.2f} %)"
                )
    assert all(misses)
    assert np.mean(counts) <= 15
