"""The head on tiles of logits: cross-entropy, error and top-5 error in one pass over the classes.

A row's state is its greatest logit m and the class of it, the others' Σ exp(x_c − m), and the
label's logit x_l:

    loss = log1p(Σ_{c ≠ argmax} exp(x_c − m)) + (m − x_l)

so that losses far below the rounding error of 1 keep their digits. The prediction is the first
maximum, and NaN counts as the maximum. A top-5 error has at least five classes ranked above its
label: greater, or equal with a smaller index. A greatest logit that is not finite gives NaN, a
label at −inf infinity, a label that is no class NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modeconn.kernels.launch import tl, triton

_NO_CLASS = tl.constexpr(2**31 - 1)


def head_reference(logits: Tensor, targets: Tensor, top5: bool = False) -> Tensor:
    """Sums loss, errors and top-5 errors of logits [T, N, C] over the samples, in plain PyTorch.

    Returns:
        [T, 3] of the logits' dtype; the loss is differentiable.
    """
    # NaN is greatest, and the first of equals is taken
    greatest, first = logits.detach().max(-1, keepdim=True)
    own = logits.gather(-1, targets.expand(logits.shape[:-1])[..., None])
    classes = torch.arange(logits.shape[-1], device=logits.device)
    greatest = logits.gather(-1, first)
    others = (logits - greatest).exp().masked_fill(classes == first, 0)
    loss = others.sum(-1).log1p() + (greatest - own)[..., 0]
    loss = loss.masked_fill(~greatest[..., 0].isfinite(), float("nan"))
    above = (logits > own) | (logits.isnan() & ~own.isnan())
    above |= ((logits == own) | (logits.isnan() & own.isnan())) & (classes < targets[:, None])
    ranked = above.sum(-1) >= 5 if top5 else torch.zeros_like(loss)
    columns = loss, first[..., 0] != targets, ranked
    return torch.stack([column.to(logits).sum(-1) for column in columns], -1)


@triton.jit
def log1p(s):
    """Computes log(1 + s) of s ≥ 0 to the last digits.

    While 1 + s would lose them, by the series of 2 artanh(s / (2 + s)).
    """
    z = s / (2.0 + s)
    q = z * z
    series = 2.0 * z * (1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9)))))
    return tl.where(s < 0.5, series, tl.log(1.0 + s))


@triton.jit
def head_start(ROWS: tl.constexpr):
    """Returns the state of rows before any class.

    The state is (greatest logit, its class, Σ exp of the others, the label's logit), each [ROWS].
    """
    return (
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.int32),
        tl.zeros((ROWS,), tl.float32),
        tl.full((ROWS,), float("nan"), tl.float32),
    )


@triton.jit
def head_update(z, c, classes, label, state):
    """Returns the state after the logits z [rows, columns] of the next classes c, in order."""
    greatest, first, others, own = state
    c = c[None, :]
    inside = c < classes
    z = tl.where(inside, z, float("-inf"))
    nan = z != z
    top = tl.max(tl.where(nan, float("-inf"), z), 1)
    first_nan = tl.min(tl.where(nan, c, _NO_CLASS), 1)
    has_nan = first_nan < _NO_CLASS
    here = tl.where(has_nan, first_nan, tl.min(tl.where(z == top[:, None], c, _NO_CLASS), 1))
    top = tl.where(has_nan, float("nan"), top)
    # Equal values are a difference of 0, infinite ones too: a tile of −inf may yet be followed by
    # something finite.
    power = tl.exp(tl.where(z == top[:, None], 0.0, z - top[:, None]))
    rest = tl.sum(tl.where(inside & (c != here[:, None]), power, 0.0), 1)
    better = (top > greatest) | (has_nan & (greatest == greatest))
    high = tl.where(better, top, greatest)
    low = tl.where(better, greatest, top)
    scale = tl.exp(tl.where(low == high, 0.0, low - high))
    others = tl.where(better, rest + (others + 1.0) * scale, others + (rest + 1.0) * scale)
    found = inside & (c == label[:, None])
    own = tl.where(tl.max(found.to(tl.int32), 1) > 0, tl.sum(tl.where(found, z, 0.0), 1), own)
    return high, tl.where(better, here, first), others, own


@triton.jit
def head_rank(z, c, classes, label, state):
    """Counts, for each row, the classes among c that rank above the label."""
    _, _, _, own = state
    c = c[None, :]
    own = own[:, None]
    equal = (z == own) | ((z != z) & (own != own))
    above = (z > own) | ((z != z) & (own == own)) | (equal & (c < label[:, None]))
    return tl.sum((above & (c < classes)).to(tl.int32), 1)


@triton.jit
def head_store(sums, row, rows, label, state, rank, TOP5: tl.constexpr):
    """Writes a tile's sums over its rows of loss, errors and top-5 errors, in float64."""
    greatest, first, others, own = state
    exists = row < rows
    loss = tl.where(tl.abs(greatest) < float("inf"), log1p(others) + (greatest - own), float("nan"))
    tl.store(sums, tl.sum(tl.where(exists, loss, 0.0).to(tl.float64), 0))
    tl.store(sums + 1, tl.sum((exists & (first != label)).to(tl.int32), 0).to(tl.float64))
    if TOP5:
        tl.store(sums + 2, tl.sum((exists & (rank >= 5)).to(tl.int32), 0).to(tl.float64))
    else:
        tl.store(sums + 2, tl.full((), 0.0, tl.float64))
