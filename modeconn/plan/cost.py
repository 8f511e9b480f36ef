"""Arithmetic of operations, as plans count it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from modeconn.capture.graph import Node


def flops(node: Node, weights: Sequence[Tensor], numel: float) -> float:
    """Counts a node's arithmetic per row: 2 per multiply-add, 1 per number of anything else.

    Args:
        weights: the node's parameters and buffers.
        numel: of its value, per row.
    """
    if node.op == "addmm" and len(weights) == 2:
        return 2.0 * numel * len(weights[1])
    if node.op.startswith("conv_transpose") and weights:
        # Every input goes to each output of its kernel, and strides spread the outputs.
        weight, stride = weights[0], node["stride"]
        spread: int = math.prod(stride) ** ((weight.dim() - 2) // len(stride))
        return 2.0 * numel * weight.numel() / max(weight.shape[1], 1) / spread
    if node.op == "linear" or node.op.startswith("conv"):
        return 2.0 * numel * weights[0].numel() / max(len(weights[0]), 1) if weights else numel
    if node.op == "module":
        # Nothing is known of its inside: each of its parameters is taken to be used once.
        return 2.0 * sum(tensor.numel() for tensor in weights if tensor.is_floating_point())
    return 0.0 if node.op == "input" else numel
