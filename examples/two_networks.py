"""The loss barrier on the straight line between two networks.

Trains two small perceptrons on scikit-learn's digits from different seeds, and evaluates the line
between them at 51 points in one pass over the data.
"""

from __future__ import annotations

import torch
from torch import nn

import modeconn as mc


def trained(seed: int, inputs: torch.Tensor, targets: torch.Tensor) -> nn.Module:
    """Trains a perceptron from a seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(25):
        for rows in torch.randperm(len(inputs)).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    return model


def main() -> None:
    images = mc.datasets.load("digits")
    inputs, targets = images.inputs.flatten(1).float() / 16, images.targets
    a, b = (trained(seed, inputs, targets) for seed in (1, 2))

    path = mc.Line(a, b)
    result = mc.evaluate(a, path, (inputs, targets), points=51)
    print(result.terminal_plot(width=80, height=14))
    print(f"barrier in loss {result.barrier('loss'):.3g}, in error {result.barrier('error'):.1%}")

    # The plan tells what was computed once, and what at every point.
    print(mc.explain(a, path, inputs[:8], points=51))


if __name__ == "__main__":
    main()
