"""Batch statistics of the engine and of PyTorch, and networks to compare them on."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.capture.export import capture
from modeconn.evaluation.resume import Unfinished
from modeconn.evaluation.statistics import NormStatistics
from modeconn.parameters.paths import Path
from native_cases import engine

SINGLE, DOUBLE = torch.float32, torch.float64


def statistics(
    model: nn.Module, path: Path, x: Tensor, t: object, dtype: torch.dtype, batch_size: int
) -> dict[str, Tensor]:
    model = copy.deepcopy(model).to(dtype).eval()
    with torch.no_grad(), Unfinished(None, {}).stage("statistics") as stage:
        batches = [(part, None) for part in x.to(dtype).split(batch_size)]
        graph = capture(model, batches[0][0])
        norms = NormStatistics(graph, path, path.points(t), dtype, torch.device("cpu"))
        return norms.recompute(batches, stage).tables


def drawn(make: object, seed: int) -> nn.Module:
    """A network in float64, whose norms have scales of either sign."""
    torch.manual_seed(seed)
    network = make().double()  # type: ignore[operator]
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
    return network


def rows_net(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 9),
        norm(9),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(9, 63, bias=False),
        norm(63, affine=False),
        nn.Tanh(),
        norm(63),
        nn.Linear(63, 4),
    )


def refused(*layers: dict[str, object], call: str = "chain_statistics", rows: int = 4) -> None:
    x, ones = np.zeros((rows, 3, 2, 2), np.float32), np.ones((1, 1))
    conv = {"op": "conv2d", "weights": [np.zeros((4, 3, 1, 1), np.float32)], "coefficients": ones}
    more = {"out": np.zeros((1, rows, 16), np.float32)} if call == "chain_outputs" else {}
    getattr(engine, call)([x], ones, [conv, *layers], **more)
