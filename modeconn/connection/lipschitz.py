"""Bounds on how much the steps of a layer can lengthen a difference, in the Euclidean norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from modeconn.capture.graph import Node
from modeconn.connection.activation_bounds import bounds_of, pooling_factor
from modeconn.connection.layer_chain import ACTIVATIONS, AffineLayer

# Squarings of a Gram matrix: its 2^k-th power has a norm of at most n^(1 / 2^(k+1)) times that of
# its largest eigenvalue, 1.05 for n = 1000.
_SQUARINGS = 6
# Beyond this size a power costs more than it is worth, and the Frobenius norm is taken.
_LARGE = 1500
_MARGIN = 1 + 1e-9


def of_matrix(weight: Tensor) -> float:
    """Returns an upper bound of the largest singular value of a matrix."""
    matrix = weight.detach().double()
    frobenius = float(matrix.norm())
    if min(matrix.shape) > _LARGE or not 0 < frobenius < math.inf:
        return frobenius * _MARGIN
    matrix = matrix / frobenius
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    logarithm = 0.0  # of the norm, divided by the power so far
    for k in range(_SQUARINGS):
        size = float(gram.norm())
        logarithm += math.log(size) / 2**k
        gram = gram / size
        gram = gram @ gram
    logarithm += math.log(float(gram.norm())) / 2**_SQUARINGS
    return frobenius * math.exp(logarithm / 2) * _MARGIN


def of_affine(layer: AffineLayer, weight: Tensor) -> float:
    """Returns the bound of a layer's affine map.

    A convolution is a matrix times the patches, and each input is in a few of these.
    """
    if layer.kind == "linear":
        return of_matrix(weight)
    strides = layer.affine["stride"]
    overlaps = [math.ceil(k / s) for k, s in zip(layer.kernel, _pair(strides))]
    patches = math.sqrt(math.prod(overlaps)) * of_matrix(weight.flatten(1))
    offsets = weight.flatten(2).unbind(2)
    return min(patches, sum(of_matrix(offset) for offset in offsets))


def of_step(node: Node) -> float:
    """Returns the bound of a step other than a norm."""
    if node.op in ACTIVATIONS:
        bounds = bounds_of(node)
        return math.inf if bounds is None else bounds.slope
    if node.op in ("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"):
        kernel = _pair(node["kernel_size"])
        strides = _pair(node.arguments.get("stride") or kernel)
        overlaps = [math.ceil(k / s) for k, s in zip(kernel, strides)]
        return math.sqrt(math.prod(overlaps)) * pooling_factor(node)
    # Windows of an adaptive pooling overlap their neighbours at most.
    return 2.0 if node.op.startswith("adaptive") else 1.0


def of_norm(scale: Tensor) -> float:
    """Returns the bound of a norm in eval mode."""
    return float(scale.abs().max()) if scale.numel() else 1.0


def _pair(value: Any) -> list[int]:
    """Returns the two numbers that one or two stand for."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(numbers[0]), int(numbers[-1])]


def lengths(values: Tensor) -> Tensor:
    """Returns the Euclidean norm of each row [N]."""
    found: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1)
    return found
