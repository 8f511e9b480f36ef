"""Directions that span a plane: random ones, and the principal components of a trajectory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modeconn.errors import ModeconnError
from modeconn.parameters.state import State

_STATISTICS = ("running_mean", "running_var")


def principal_plane(
    states: Sequence[State], centre: int
) -> tuple[State, State, np.ndarray, np.ndarray]:
    """Find the principal components of checkpoints around one of them (Li et al. 2018, sec. 7.2).

    The components are those of the differences to the centre, over all parameters; norms' running
    statistics follow along but do not count. That takes the n × n matrix of products of n
    checkpoints, and never one of the size of the parameters.

    Returns:
        Two directions of length 1, at right angles; the checkpoints' coordinates [n, 2]; the share
        of the sum of squared distances that each direction explains, [2].

    Raises:
        ModeconnError: the checkpoints lie on one line, or at one point.
    """
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    for key, base in states[centre].items():
        if base.is_floating_point() and not key.endswith(_STATISTICS):
            differences = [state[key].double() - base.double() for state in states]
            rows = torch.stack([each.flatten().cpu() for each in differences])
            gram += rows @ rows.t()
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(gram))
    total = float(values.clamp_min(0).sum())
    if not total or float(values[1]) <= 1e-12 * total:
        raise ModeconnError(
            f"the {len(states)} checkpoints lie on one line: "
            "expected a trajectory that spans a plane"
        )
    weights = vectors[:, :2] / values[:2].sqrt()
    places = gram @ weights
    # an eigenvector's sign is anyone's choice: fix it
    sign = torch.where(places[int(centre == 0)] < 0, -1.0, 1.0)
    weights, places = weights * sign, places * sign
    u, v = (_combined(states, centre, weights[:, i]) for i in range(2))
    return u, v, places.numpy(), (values[:2] / total).numpy()


def _combined(states: Sequence[State], centre: int, weights: Tensor) -> State:
    """Return Σ_i weights[i] · (states[i] - states[centre])."""
    direction = {}
    for key, base in states[centre].items():
        if base.is_floating_point():
            total = torch.zeros(base.shape, dtype=torch.float64)
            for weight, state in zip(weights.tolist(), states):
                total += weight * (state[key].double() - base.double()).cpu()
            direction[key] = total.to(base)
    return direction


def random_direction(
    base: State, generator: torch.Generator, norm: str | None, biases: bool
) -> State:
    """Draw a direction, scaled to a network (Li et al. 2018, section 4).

    Args:
        base: the network.
        generator: of the random numbers, on the CPU.
        norm: "filter", "layer" or None: the norms of the network that the direction's are set to.
        biases: whether vectors have a direction, too.
    """
    direction = {}
    for key, value in base.items():
        moves = value.is_floating_point() and not key.endswith(_STATISTICS)
        if not moves or (value.dim() <= 1 and not biases):
            continue
        d = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        w = value.detach().double().cpu()
        if norm == "layer" or (norm == "filter" and w.dim() <= 1):
            d *= w.norm() / d.norm().clamp_min(1e-10)
        elif norm == "filter":
            axes = tuple(range(1, w.dim()))
            norms = [torch.linalg.vector_norm(v, dim=axes, keepdim=True) for v in (w, d)]
            d *= norms[0] / norms[1].clamp_min(1e-10)
        direction[key] = d.to(value)
    return direction
