"""A plane through three checkpoints, evaluated in one pass and drawn.

The checkpoints are files; modules and state dicts do as well. The figure needs matplotlib and is
written to plane.png in the current folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import modeconn as mc

STEPS = 21


def main() -> None:
    images = mc.datasets.load("digits", limit=500)
    inputs, targets = images.inputs.flatten(1).float() / 16, images.targets
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(100):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
            files.append(Path(folder, f"{seed}.pt"))
            torch.save(model.state_dict(), files[-1])

        plane = mc.Plane.through(*files)
        result = mc.evaluate(model, plane, (inputs, targets), points=STEPS)

    lowest, highest = result.loss.argmin(), result.loss.argmax()
    print(f"{len(result.t)} points in {result.passes} pass")
    print(f"lowest loss {result.loss[lowest]:.3g} at {result.t[lowest]}")
    print(f"highest loss {result.loss[highest]:.3g} at {result.t[highest]}")
    result.plot().figure.savefig("plane.png", dpi=160)
    print("wrote plane.png")


if __name__ == "__main__":
    main()
