"""Operations of the graph as kernels are told of them, for the CPU and GPU backends alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeconn.capture.graph import Node
from modeconn.errors import Unsupported
from modeconn.plan.program import Moving
from modeconn.plan.units import Shape

_PASS_THROUGH = ("clone", "alias", "detach", "dropout", "contiguous")

# A norm's scale beyond this is not multiplied into weights: sums of the products could overflow
# where the layer's own sums, and what the norm makes of them, do not.
LARGEST_FOLDED = 1e15


def passes_through(node: Node, before: Shape) -> bool:
    """Whether an operation leaves a value of a shape as it is."""
    if node.op == "adaptive_avg_pool2d":
        return pair(node["output_size"]) == tuple(before[2:])
    return node.op in _PASS_THROUGH


def pair(value: Any) -> tuple[Any, Any]:
    """(height, width) of what PyTorch takes as one or two numbers."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def of_dtype(entry: Tensor | Moving, dtype: torch.dtype) -> bool:
    """Whether an entry is as precise as a computation in a dtype takes it.

    A constant keeps its own dtype, and PyTorch promotes what it meets; a single number promotes
    nothing.
    """
    like = entry if isinstance(entry, Tensor) else entry.like
    return like.dtype == dtype or not like.is_floating_point() or like.dim() == 0


def operands(node: Node) -> tuple[Any, Any]:
    """The two sides of an arithmetic operation, whatever its schema calls them."""
    first, second = list(node.arguments.values())[:2]
    return first, second


def unsupported(node: Node, runs: str, argument: str | None = None) -> Unsupported:
    """The error for an operation that no kernel has, or not with this argument.

    Args:
        runs: what the engine runs instead, for the message.
        argument: the name of the argument whose value is the reason.
    """
    given = "" if argument is None else f" with {argument}={node[argument]!r}"
    return Unsupported(f"{node.op}{given} ({node.source}): the engine runs {runs}")


def convolution_geometry(node: Node) -> dict[str, Any]:
    """Stride and padding of a convolution, and its dilation and groups where they are not 1.

    Raises:
        Unsupported: padding by name.
    """
    if isinstance(node["padding"], str):
        raise unsupported(node, "conv2d with padding in pixels", "padding")
    geometry: dict[str, Any] = {"stride": pair(node["stride"]), "padding": pair(node["padding"])}
    if pair(node["dilation"]) != (1, 1):
        geometry["dilation"] = pair(node["dilation"])
    if node["groups"] != 1:
        geometry["groups"] = node["groups"]
    return geometry


def pooling_geometry(node: Node, ceil: bool = False) -> dict[str, Any]:
    """Kernel, stride and padding of max_pool2d or avg_pool2d.

    Args:
        ceil: whether a maximum may round its size up, which the geometry then tells.

    Raises:
        Unsupported: a dilation, a size that is rounded up, or a mean over another count.
    """
    geometry: dict[str, Any] = {
        "kernel": pair(node["kernel_size"]),
        "stride": pair(node["stride"] or node["kernel_size"]),
        "padding": pair(node["padding"]),
    }
    expected: dict[str, Any] = {"ceil_mode": False}
    if node.op == "avg_pool2d":
        expected |= {"count_include_pad": True, "divisor_override": None}
    elif pair(node["dilation"]) != (1, 1):
        raise unsupported(node, "max_pool2d with dilation=1", "dilation")
    elif ceil and node["ceil_mode"]:
        geometry["ceil"] = expected["ceil_mode"] = True
    for argument, value in expected.items():
        if node[argument] != value:
            raise unsupported(node, f"{node.op} with {argument}={value}", argument)
    return geometry
