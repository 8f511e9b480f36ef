"""Plain PyTorch, as modeconn replaces it: a pass over the data per point, and small networks."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.parameters.paths import Path


def pass_per_point(
    model: nn.Module,
    path: Path,
    x: Tensor | dict[str, Tensor],
    y: Tensor,
    t: np.ndarray,
    dtype: torch.dtype,
) -> dict[str, np.ndarray]:
    """Mean cross-entropy and error at each t, per token where the outputs and y have tokens."""
    network = copy.deepcopy(model).to(dtype).eval()
    rows = []
    for row in path.coefficients(t):
        state = {
            key: sum(
                c * point[key].to(dtype) for c, point in zip(row.tolist(), path.control_points)
            )
            if value.is_floating_point()
            else value
            for key, value in path.control_points[0].items()
        }
        network.load_state_dict(state)
        with torch.no_grad():
            outputs = (
                network(**x)
                if isinstance(x, dict)
                else network(x.to(dtype) if x.is_floating_point() else x)
            )
        rows.append(loss_and_error(outputs, y))
    loss, error = np.array(rows).T
    return {"loss": loss, "error": error}


def re_estimated(
    model: nn.Module,
    path: Path,
    x: Tensor,
    y: Tensor,
    t: np.ndarray,
    dtype: torch.dtype,
    *,
    batch_size: int,
    batches: int | None = None,
    train: Tensor | None = None,
) -> dict[str, np.ndarray]:
    """Mean cross-entropy and error at each t, behind a pass that re-estimates batch norms anew."""
    rows = []
    for t_value in t:
        network = copy.deepcopy(model)
        network.load_state_dict(path.at(t_value))
        network = network.to(dtype)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.momentum = None
        network.train()
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        source = (x if train is None else train).to(dtype)
        with torch.no_grad():
            for batch in source.split(batch_size)[:batches]:
                network(batch)
            rows.append(loss_and_error(network.eval()(x.to(dtype)), y))
    loss, error = np.array(rows).T
    return {"loss": loss, "error": error}


def loss_and_error(outputs: object, y: Tensor) -> tuple[float, float]:
    """Mean cross-entropy and error of logits, or of an object that has them, [N, …, classes]."""
    logits = getattr(outputs, "logits", outputs).flatten(0, -2)
    losses = F.cross_entropy(logits, y.reshape(-1), reduction="none")
    return losses.double().mean().item(), (logits.argmax(1) != y.reshape(-1)).double().mean().item()


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    """A fully connected network with random weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        layers += [activation()] * (i > 0) + [nn.Linear(before, after)]
    return nn.Sequential(*layers)


def clone(state: dict[str, Tensor] | nn.Module) -> dict[str, Tensor]:
    """A state dict of its own."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    return {key: value.clone() for key, value in state.items()}
