"""Numbers near the ends of what float32 holds, and results compared in kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from policy import assert_within_policy

FINITE = (0.0, -1e-45, 1e20, -3e38)
EXTREMES = (*FINITE, float("inf"), float("nan"))
BACKENDS = ("reference", "native", "triton")
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


def kinds(values: Any) -> np.ndarray:
    """0 for a finite number, 1 and -1 for infinities, 2 for NaN."""
    values = np.asarray(values, np.float64)
    signs = np.where(np.isinf(values), np.sign(values), 0)
    return np.where(np.isnan(values), 2, signs).astype(int)


def assert_same_kind(name: str, got: Any, plain: Any, exact: Any) -> None:
    """Compare with plain PyTorch and with float64, each of which is right where they differ.

    float64 has no overflow where float32 has. Numbers that are finite in all three keep to the
    policy.
    """
    got, plain, exact = (np.asarray(v, np.float64) for v in (got, plain, exact))
    with np.errstate(over="ignore"):
        near = exact.astype(np.float32)
    allowed = [kinds(plain), kinds(exact), kinds(near)]
    same = np.logical_or.reduce([kinds(got) == kind for kind in allowed])
    assert same.all(), f"{name}: {got}, plain {plain}, float64 {exact}"
    finite = np.isfinite(got) & np.isfinite(plain) & np.isfinite(exact)
    assert_within_policy(name, got[finite], plain[finite], exact[finite], torch.float32)


def per_point(
    model: nn.Module, path: Any, x: Tensor, y: Tensor, t: Any, loss: Loss, dtype: torch.dtype
) -> np.ndarray:
    """The loss at each t by plain PyTorch; coefficients of 0 leave their network out."""
    network, losses = copy.deepcopy(model).to(dtype).eval(), []

    def number(v: Tensor) -> Tensor:
        return v.to(dtype) if v.is_floating_point() else v

    for row in path.coefficients(np.array(t, float)).tolist():
        state = {}
        for key, first in path.control_points[0].items():
            terms = [c * number(p[key]) for c, p in zip(row, path.control_points) if c]
            state[key] = sum(terms) if first.is_floating_point() else first
        network.load_state_dict(state)
        with torch.no_grad():
            losses.append(float(loss(network(number(x)), number(y)).double()))
    return np.array(losses)


def agrees(
    model: nn.Module,
    path: Any,
    x: Tensor,
    y: Tensor,
    backend: str,
    loss: str = "cross_entropy",
    t: Any = (0.0, 0.25, 0.5, 1.0),
) -> None:
    """Evaluate a path by a backend, and compare in kind."""
    got = mc.evaluate(model, path, (x, y), t, loss=loss, metrics="loss", backend=backend)
    assert got.backend == backend
    plain, exact = (
        per_point(model, path, x, y, t, LOSSES[loss], d) for d in (torch.float32, torch.float64)
    )
    assert_same_kind(f"{backend} {loss}", got.loss, plain, exact)


def changed(model: nn.Module, key: str, value: float, place: int = 1) -> dict[str, Tensor]:
    """The state of a network with one number replaced."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state[key].view(-1)[place] = value
    return state
