"""Proves that no w has a · w > 0 for all of given rows a (Farkas' lemma), despite rounding.

If positive multipliers λ give Σ λ a = 0, no w can make every a · w positive. Multipliers found
numerically leave a residual r = Σ λ a that is not quite 0. They still prove it: with M = Σ λ a aᵀ
the multipliers λ (1 - aᵀ M⁻¹ r) give exactly 0, and they are positive as soon as max |a| · |r| is
less than the smallest eigenvalue of M, which is checked with bounds on the rounding of r and of M.
The multipliers are those of a logistic regression at its minimum, where the gradient, Σ λ a with λ
= sigmoid(-a · w), vanishes. A proof for some of the rows is one for all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_EPS = float(np.finfo(np.float64).eps)
# Newton steps before rows that are far on the right side are left out, and rounds of that. Newton's
# method converges in about ten steps where there is a minimum at all.
_STEPS = 12
_ROUNDS = 8
# Such rows have a · w above this: multipliers below 0.001.
_FAR = 7.0
# Added to the curvature's diagonal, relative to its mean: the rows may not span the space.
_RIDGE = 1e-13
# Halvings of a Newton step: one that is a billion times too long is too long for ever.
_HALVINGS = 30
# A symmetric eigenvalue is wrong by at most this multiple of D ε |M|, with room to spare.
_EIGENVALUE_ERROR = 100
# Covers the rounding of the final comparison's own few operations.
_SAFETY = 1.01


def affine(x: Tensor) -> Tensor:
    """Appends a column of ones: (x, 1) in float64."""
    x = x.double()
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def inequalities(raw: Tensor, y: Tensor, C: int) -> Tensor:
    """Writes every inequality as a row a of a · w > 0, [N (C - 1), (C - 1) (d + 1)].

    The last class's readout is taken to be 0.
    """
    x = affine(raw)
    N, wide = x.shape
    rows = x.new_zeros(N, C, C, wide)
    rows[torch.arange(N), :, y] = x[:, None]
    for k in range(C):
        rows[:, k, k] -= x
    others = torch.arange(C)[None, :] != y[:, None]
    return rows[:, :, : C - 1][others].reshape(N * (C - 1), (C - 1) * wide)


def proves_none(rows: Tensor) -> bool:
    """Proves that no w has a · w > 0 for all rows a [m, D], if it can.

    The multipliers come from Newton's method on Σ log(1 + exp(-a · w)). False means nothing: there
    may be such a w or not.
    """
    for _ in range(_ROUNDS):
        rows = _independent(rows)
        w = rows.new_zeros(rows.shape[1])
        for _ in range(_STEPS):
            moved = _newton(rows, w)
            if _check(rows, w):
                return True
            if not moved:
                break
        z = rows @ w
        near = z < _FAR
        # Rows that a direction separates from the others have multipliers that go to 0: the rest
        # must do without them.
        if bool((z > 0).all()) or bool(near.all()) or not bool(near.any()):
            return False
        rows = rows[near]
    return False


def _newton(rows: Tensor, w: Tensor) -> bool:
    """Takes a Newton step in place, halved until the loss falls; returns False if it does not."""
    z = rows @ w
    multipliers = torch.sigmoid(-z)
    curvature = (rows * (multipliers * (1 - multipliers))[:, None]).T @ rows
    curvature.diagonal().add_(_RIDGE * float(curvature.trace()) / len(curvature) + 1e-290)
    step, info = torch.linalg.solve_ex(curvature, rows.T @ multipliers)
    if int(info) or not bool(torch.isfinite(step).all()):
        return False
    along, before, length = rows @ step, float(F.softplus(-z).sum()), 1.0
    for _ in range(_HALVINGS):
        # Near the minimum the loss changes by less than its rounding: there Newton's step is right
        # as it is.
        if float(F.softplus(-(z + length * along)).sum()) <= before * (1 + 1e-12):
            w += length * step
            return True
        length /= 2
    return False


def _check(rows: Tensor, w: Tensor) -> bool:
    """Whether λ = sigmoid(-a · w) proves it, rounding included.

    It does where max |a| · |Σ λ a| is below the smallest eigenvalue of Σ λ a aᵀ.
    """
    m, D = rows.shape
    multipliers = torch.sigmoid(-(rows @ w))
    if not bool((multipliers > 0).all()):
        return False
    # A sum of m products, in any order, is wrong by at most m ε / 2 times the sum of their sizes
    # (Higham 2002, section 3.1).
    rounding = 2 * (m + 8) * _EPS
    sizes = float((rows.abs().T @ multipliers).norm())
    residual = float((rows.T @ multipliers).norm()) + rounding * sizes
    squares = rows.square().sum(1)
    needed = _SAFETY * float(squares.max().sqrt()) * residual
    if not needed < float(multipliers @ squares) / D:
        return False  # the smallest eigenvalue is no larger than their mean
    matrix = (rows * multipliers[:, None]).T @ rows
    # The norm of Σ λ |a| |a|ᵀ is at most its trace; a symmetric eigenvalue is wrong by a modest
    # multiple of D ε |M|.
    error = (rounding + _EIGENVALUE_ERROR * D * _EPS) * float(matrix.trace())
    return needed < float(torch.linalg.eigvalsh(matrix)[0]) - error


def _independent(rows: Tensor) -> Tensor:
    """Scales columns by powers of 2, which is exact, and drops those that add nothing.

    These are columns of zeros, equal ones, and multiples of a column with one value up to sign:
    dead features and constant ones, for which the column of ones stands.
    """
    largest = rows.abs().amax(0)
    scaled = rows[:, largest > 0]
    largest = largest[largest > 0]
    scaled = scaled * torch.exp2(-torch.ceil(torch.log2(largest)))
    columns = scaled.T.contiguous()
    single = ((columns == 0) | (columns.abs() == columns.abs().amax(1, keepdim=True))).all(1)
    kept, seen = [], set()
    for j in reversed(range(len(columns))):
        column = columns[j]
        if single[j]:
            signs = column.sign()
            column = signs * signs[int(signs.abs().argmax())]
        key = column.numpy().tobytes()
        if key not in seen:
            seen.add(key)
            kept.append(j)
    return scaled[:, kept[::-1]].contiguous()


def largest_margin(rows: Tensor) -> Tensor | None:
    """Finds the w in [-1, 1]^D that makes the smallest a · w largest, by linear programming.

    Returns None without scipy or success.
    """
    try:
        from scipy.optimize import linprog
    except ImportError:
        return None
    m, D = rows.shape
    bounds = [(-1.0, 1.0)] * D + [(None, 1.0)]
    inequalities = torch.cat([-rows, rows.new_ones(m, 1)], 1).numpy()
    solved = linprog(
        np.r_[np.zeros(D), -1.0], inequalities, np.zeros(m), bounds=bounds, method="highs"
    )
    if solved.x is None or solved.x[-1] <= 0:
        return None
    return torch.from_numpy(solved.x[:-1].copy())
