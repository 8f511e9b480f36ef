"""What modeconn replaces: load the weights of a point, run the data through the network, go on to the next point."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.paths import Path


def pass_per_point(
    model: nn.Module, path: Path, x: Tensor, y: Tensor, t: np.ndarray, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """Mean cross-entropy and error at each t, by plain PyTorch at a precision."""
    network = copy.deepcopy(model).to(dtype).eval()
    rows = []
    for row in path.coefficients(t):
        state = {
            key: sum(c * point[key].to(dtype) for c, point in zip(row.tolist(), path.control_points))
            if value.is_floating_point()
            else value
            for key, value in path.control_points[0].items()
        }
        network.load_state_dict(state)
        with torch.no_grad():
            outputs = network(x.to(dtype) if x.is_floating_point() else x)
        losses = F.cross_entropy(outputs, y, reduction="none")
        rows.append((losses.double().mean().item(), (outputs.argmax(1) != y).double().mean().item()))
    loss, error = np.array(rows).T
    return {"loss": loss, "error": error}


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
