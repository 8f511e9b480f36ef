"""The activations, by the C++ engine's names: in Triton with their derivatives, and in PyTorch.

    identity  u                         gelu       u Φ(u), Φ the normal distribution's
    relu      max(u, 0)                 gelu_tanh  u (1 + tanh(√(2/π) (u + 0.044715 u³))) / 2
    leaky_relu  u > 0 ? u : slope u     silu       u σ(u)
    tanh, sigmoid σ(u) = 1 / (1 + exp(−u))

NaN stays NaN, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.kernels.launch import tl, triton

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda u, slope: u,
    "relu": lambda u, slope: F.relu(u),
    "leaky_relu": F.leaky_relu,
    "tanh": lambda u, slope: torch.tanh(u),
    "gelu": lambda u, slope: F.gelu(u),
    "gelu_tanh": lambda u, slope: F.gelu(u, approximate="tanh"),
    "silu": lambda u, slope: F.silu(u),
    "sigmoid": lambda u, slope: torch.sigmoid(u),
}


def act(u: Tensor, activation: str, slope: float = 0.01) -> Tensor:
    """Applies an activation in PyTorch, in any dtype: the reference."""
    return ACTIVATIONS[activation](u, slope)


def derivative_from_output(activation: str, slope: float) -> bool:
    """Whether `derivative` may take the activation's output, which has the sign of its input."""
    return activation in ("identity", "relu") or (activation == "leaky_relu" and slope > 0)


@triton.jit
def sigmoid(u):
    """Computes 1 / (1 + exp(−u)); where exp overflows to infinity, the quotient is right, 0."""
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def tanh(u):
    """Computes tanh(u), by its series below 1/4, where the quotient would cancel."""
    square = u * u
    series = u + u * square * (
        -1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))
    )
    small = tl.exp(-2.0 * tl.abs(u))
    quotient = (1.0 - small) / (1.0 + small)
    return tl.where(square < 0.0625, series, tl.where(u < 0, -quotient, quotient))


@triton.jit
def bell(u):
    """Computes σ'(u) = σ(u) (1 − σ(u)); small values keep their digits."""
    small = tl.exp(-tl.abs(u))
    return small / ((1.0 + small) * (1.0 + small))


@triton.jit
def activate(u, ACTIVATION: tl.constexpr, slope):
    """Applies an activation to a float32 block."""
    if ACTIVATION == "relu":
        u = tl.where(u < 0, 0.0, u)
    elif ACTIVATION == "leaky_relu":
        u = tl.where(u > 0, u, u * slope)
    elif ACTIVATION == "tanh":
        u = tanh(u)
    elif ACTIVATION == "gelu":
        u = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        u = 0.5 * u * (1.0 + tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))
    elif ACTIVATION == "silu":
        u = u * sigmoid(u)
    elif ACTIVATION == "sigmoid":
        u = sigmoid(u)
    return u


@triton.jit
def derivative(u, ACTIVATION: tl.constexpr, slope):
    """Computes d activation / du.

    As in PyTorch, relu has 0 at 0 and lets NaN pass, and leaky_relu has its slope at 0.
    """
    d = u * 0.0 + 1.0
    if ACTIVATION == "identity":
        d = tl.full(u.shape, 1.0, tl.float32)
    elif ACTIVATION == "relu":
        d = tl.where(u <= 0, 0.0, 1.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(u > 0, 1.0, slope)
    elif ACTIVATION == "tanh":
        d = 4.0 * bell(2.0 * u)
    elif ACTIVATION == "gelu":
        d = (
            0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
            + u * tl.exp(-0.5 * u * u) * 0.3989422804014327
        )
    elif ACTIVATION == "gelu_tanh":
        y = tanh(0.7978845608028654 * (u + 0.044715 * u * u * u))
        slope_of_tanh = 4.0 * bell(1.5957691216057308 * (u + 0.044715 * u * u * u))
        d = 0.5 * (1.0 + y) + 0.5 * u * slope_of_tanh * 0.7978845608028654 * (
            1.0 + 0.134145 * u * u
        )
    elif ACTIVATION == "silu":
        y = sigmoid(u)
        d = y * (1.0 + u * (1.0 - y))
    elif ACTIVATION == "sigmoid":
        d = bell(u)
    return d
