"""Tiles of a chain of layers whose values move between two blocks of scratch, [ROWS, SIZE] each."""

from __future__ import annotations

from modeconn.kernels.activations import activate
from modeconn.kernels.launch import multiply, tl, triton
from modeconn.kernels.tiles import load_samples, sample_rows


@triton.jit
def chain_units(
    source,
    layer,
    unit,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes act(x Wᵀ + b) of some units of a layer.

    Args:
        source: x, [ROWS, SIZE].
        layer: (weights [SIZE, SIZE], biases [SIZE], width, slope), padded with zeros.
    """
    weights, biases, width, slope = layer
    k = tl.arange(0, BLOCK_K)
    x = source + tl.arange(0, ROWS)[:, None] * SIZE + k[None, :]
    w = weights + unit[None, :] * SIZE + k[:, None]
    total = tl.zeros((ROWS, unit.shape[0]), tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        total = multiply(tl.load(x + start), tl.load(w + start), total, PRECISION)
    total = activate(total + tl.load(biases + unit)[None, :], ACTIVATION, slope)
    return tl.where((unit < width)[None, :], total, 0.0)


@triton.jit
def store_input(
    samples,
    target,
    row,
    t,
    ACTIVATION: tl.constexpr,
    TERMS: tl.constexpr,
    PADDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Writes the rows of the chain's input to scratch at `target`, [ROWS, SIZE]."""
    _, _, _, _, _, _, depth, _, _ = samples
    x_rows = sample_rows(samples, row, t, TERMS)
    for start in range(0, SIZE, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = load_samples(x_rows, samples, row, k, t, ACTIVATION, TERMS, PADDED)
        value = tl.where((k < depth)[None, :], value.to(tl.float32), 0.0)
        tl.store(target + k[None, :], value.to(target.dtype.element_ty))
