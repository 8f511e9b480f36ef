"""Files that the tests of damage, of writing and of the command line share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import modeconn as mc
from modeconn import cli

TENSORS = {
    "0.weight": torch.arange(12.0).reshape(3, 4),
    "0.bias": torch.tensor([1e-3, -2.0, 0.0]),
    "count": torch.tensor(7),
}


def result() -> mc.PathResult:
    t = np.linspace(0, 1, 5)
    columns = {"loss": np.array([0.1, 2, np.inf, np.nan, 1e-300]), "error": t / 3}
    return mc.PathResult(t, columns, 10, 1, "native", 0.5, {"torch": "2", "threads": 2, "x": 0.5})


def trained(file: Path, *more: str) -> int:
    spec = "train --model mlp:64-8x1-10 --data digits --limit 300 --epochs 3 --to-the-end --quiet"
    return cli.main([*spec.split(), "--out", str(file), *more])
