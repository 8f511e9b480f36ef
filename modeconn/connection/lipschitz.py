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
# Frequencies along an axis at which a convolution is looked at: a kernel of 3 is bounded to 2 %.
_SAMPLES = 16
# Beyond so many pairs of channels only its sum is.
_PAIRS = 1 << 15


def of_matrix(weight: Tensor) -> float:
    """Returns an upper bound of the largest singular value of a matrix."""
    matrix = weight.detach().double()
    frobenius = float(matrix.norm())
    if min(matrix.shape) > _LARGE or not 0 < frobenius < math.inf:
        return frobenius * _MARGIN
    return float(_of_matrices(matrix[None])[0])


def _of_matrices(matrices: Tensor) -> Tensor:
    """Returns upper bounds of the largest singular values of matrices [M, r, c], float64 [M]."""
    frobenius = _frobenius(matrices)
    scaled = matrices / frobenius.where(frobenius > 0, 1.0)
    gram = scaled @ scaled.mH if scaled.shape[1] < scaled.shape[2] else scaled.mH @ scaled
    logarithm = torch.zeros(len(matrices), dtype=torch.float64, device=matrices.device)
    for k in range(_SQUARINGS + 1):
        size = _frobenius(gram)
        size = size.where(size > 0, 1.0)
        logarithm += size.flatten().log() / 2**k  # of the norm, divided by the power so far
        if k < _SQUARINGS:
            gram = gram / size
            gram = gram @ gram
    found: Tensor = frobenius.flatten() * (logarithm / 2).exp() * _MARGIN
    return found


def _frobenius(matrices: Tensor) -> Tensor:
    """Returns the norms of matrices [M, r, c], [M, 1, 1]."""
    real = torch.view_as_real(matrices) if matrices.is_complex() else matrices
    return real.flatten(1).square().sum(1).sqrt()[:, None, None]


def of_convolution(weight: Tensor) -> float:
    """Returns the bound of a convolution of any stride and dilation, padded with zeros.

    It is a part of the convolution on an endless image, whose norm is the largest of the matrices
    Σ_j W_j exp(i j ω) over all frequencies ω. Their norms are those of trigonometric polynomials of
    degree (k - 1) / 2 along each axis: N samples find the largest but for a factor of
    cos(π (k - 1) / 2N) (Ehlich, Zeller 1964). With absolute values it is that at frequency 0, which
    is a bound as well.

    Args:
        weight: [out, in, …] with the kernel's size.
    """
    kernel = weight.double()
    summed = of_matrix(kernel.abs().flatten(2).sum(2))
    if kernel.shape[0] * kernel.shape[1] > _PAIRS or bool((kernel >= 0).all()):
        return summed
    sizes = [max(_SAMPLES, 4 * k) for k in kernel.shape[2:]]
    axes = tuple(range(2, kernel.dim()))
    spectrum = torch.fft.rfftn(kernel, sizes, axes).flatten(2).permute(2, 0, 1)
    missed = math.prod(
        math.cos(math.pi * (k - 1) / (2 * n)) for k, n in zip(kernel.shape[2:], sizes)
    )
    return min(summed, float(_of_matrices(spectrum).max()) / missed)


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
    by_offset = sum(of_matrix(offset) for offset in offsets)
    return min(patches, by_offset, of_convolution(weight))


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
