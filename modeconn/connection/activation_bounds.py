"""Bounds an activation's values, slopes and rounding errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modeconn.capture.graph import Node


@dataclass(frozen=True)
class ActivationBounds:
    """Bounds of an activation f, for all x.

    Attributes:
        factor, offset: |f(x)| ≤ factor · |x| + offset.
        slope: |f(x) - f(y)| ≤ slope · |x - y|.
        exact: whether floating point computes f without rounding.
        kinks: where the slope jumps, beside 0.
    """

    factor: float
    offset: float
    slope: float
    exact: bool = False
    kinks: tuple[float, ...] = ()


def _of_elu(node: Node) -> ActivationBounds:
    alpha = abs(float(node["alpha"]))
    return ActivationBounds(1.0, alpha, max(1.0, alpha))


def _of_leaky_relu(node: Node) -> ActivationBounds:
    slope = max(1.0, abs(float(node["negative_slope"])))
    return ActivationBounds(slope, 0.0, slope)


def _of_hardtanh(node: Node) -> ActivationBounds:
    kinks = float(node["min_val"]), float(node["max_val"])
    return ActivationBounds(0.0, max(map(abs, kinks)), 1.0, exact=True, kinks=kinks)


# Suprema of |f'|, rounded up: GELU 1.129, SiLU 1.0998, mish 1.0885, SELU 1.7581.
_FIXED = {
    "relu": ActivationBounds(1.0, 0.0, 1.0, exact=True),
    "tanh": ActivationBounds(0.0, 1.0, 1.0),
    "sigmoid": ActivationBounds(0.0, 1.0, 0.25),
    "gelu": ActivationBounds(1.0, 0.0, 1.13),
    "silu": ActivationBounds(1.0, 0.0, 1.1),
    "selu": ActivationBounds(1.051, 1.7582, 1.7582),
    "mish": ActivationBounds(1.0, 0.0, 1.09),
    "hardswish": ActivationBounds(1.0, 0.0, 1.5, kinks=(-3.0, 3.0)),
    "hardsigmoid": ActivationBounds(0.0, 1.0, 0.17, kinks=(-3.0, 3.0)),
}
_OF_NODE: dict[str, Callable[[Node], ActivationBounds]] = {
    "elu": _of_elu,
    "celu": lambda node: ActivationBounds(1.0, abs(float(node["alpha"])), 1.0),
    "leaky_relu": _of_leaky_relu,
    "softplus": lambda node: ActivationBounds(1.0, 0.7 / abs(float(node["beta"])), 1.0),
    "hardtanh": _of_hardtanh,
}


def bounds_of(node: Node) -> ActivationBounds | None:
    """Returns the bounds of an activation's node; None where they are not known."""
    if node.op in _FIXED:
        return _FIXED[node.op]
    return _OF_NODE[node.op](node) if node.op in _OF_NODE else None


def pooled_numbers(node: Node) -> float:
    """Returns how many numbers an average pooling adds up for one of its outputs, at most."""
    if node.op in ("adaptive_avg_pool1d", "adaptive_avg_pool2d"):
        return float("inf")  # depends on the input's size: the caller knows it
    kernel = node["kernel_size"]
    sizes = list(kernel) if isinstance(kernel, (list, tuple)) else [kernel]
    return float(sizes[0] * sizes[-1])


def pooling_factor(node: Node) -> float:
    """Returns how far a pooling can exceed its inputs: 1 but for a divisor of one's own."""
    if node.op != "avg_pool2d" or not node.arguments.get("divisor_override"):
        return 1.0
    return pooled_numbers(node) / abs(float(node["divisor_override"]))
