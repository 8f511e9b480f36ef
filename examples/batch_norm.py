"""Batch norm along a path: running statistics interpolated, and recomputed at every point.

Between two networks the blend of their running statistics is not what the network in between
would have. `buffers="recompute"` estimates them from the data, for all points in one more pass.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

import modeconn as mc


def trained(seed: int, inputs: torch.Tensor, targets: torch.Tensor) -> nn.Module:
    """Trains a network with batch norms from a seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(5):
        for rows in torch.randperm(len(inputs)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    return model


def main() -> None:
    images = mc.datasets.load("digits")
    inputs, targets = images.inputs.float() / 16, images.targets
    a, b = (trained(seed, inputs, targets) for seed in (1, 2))

    results = {}
    for buffers in ("interpolate", "recompute"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # interpolated statistics are those of no network
            results[buffers] = mc.evaluate(
                a, mc.Line(a, b), (inputs, targets), points=11, buffers=buffers
            )
    for t, stale, own in zip(
        results["recompute"].t, results["interpolate"].error, results["recompute"].error
    ):
        print(f"t = {t:.1f}  error interpolated {stale:6.1%}  recomputed {own:6.1%}")
    print(f"passes over the data: {results['recompute'].passes}")


if __name__ == "__main__":
    main()
