"""The plane that shows most of a training trajectory: the first two principal components of its checkpoints."""

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
    """Principal component analysis of checkpoints around one of them (Li et al. 2018, section 7.2).

    The components are those of the differences to the centre, over all parameters; norms' running
    statistics follow along but have no say. With n checkpoints that takes an n × n matrix of
    products, and never one of the size of the parameters.

    Returns:
        two directions of length 1, at right angles; the checkpoints' coordinates [n, 2]; what share
            of the sum of squared
        distances each direction explains, [2].

    Raises:
        ModeconnError: the checkpoints lie on one line, or at one point.
    """
    counted = [
        k for k, v in states[0].items() if v.is_floating_point() and not k.endswith(_STATISTICS)
    ]
    gram = torch.zeros(len(states), len(states), dtype=torch.float64)
    for key in counted:
        rows = torch.stack(
            [
                (state[key].double() - states[centre][key].double()).flatten().cpu()
                for state in states
            ]
        )
        gram += rows @ rows.t()
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(gram))
    total = float(values.clamp_min(0).sum())
    if not total or float(values[1]) <= 1e-12 * total:
        raise ModeconnError(
            f"the {len(states)} checkpoints lie on one line: expected a trajectory that spans a plane"
        )
    weights = vectors[:, :2] / values[:2].sqrt()
    places = gram @ weights
    # an eigenvector's sign is anyone's choice: fix it
    sign = torch.where(places[int(centre == 0)] < 0, -1.0, 1.0)
    weights, places = weights * sign, places * sign
    u, v = (_combined(states, centre, weights[:, i]) for i in range(2))
    return u, v, places.numpy(), (values[:2] / total).numpy()


def _combined(states: Sequence[State], centre: int, weights: Tensor) -> State:
    """Σ_i weights[i] · (states[i] - states[centre])."""
    direction = {}
    for key, base in states[centre].items():
        if base.is_floating_point():
            total = torch.zeros(base.shape, dtype=torch.float64)
            for weight, state in zip(weights.tolist(), states):
                total += weight * (state[key].double() - base.double()).cpu()
            direction[key] = total.to(base)
    return direction
