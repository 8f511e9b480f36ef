"""Sums of control points with coefficients, added up so that large ones cost no digits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

# t * segments within this many rounding errors of a whole number is that breakpoint, so that t = i
# / n hits it bitwise.
SNAP = 4 * float(np.finfo(np.float64).eps)

# Coefficients beyond this lose digits where they sum to 1: networks are added up from differences.
_FAR = 2.0


def blend(tensors: Sequence[Tensor], row: Sequence[float] | np.ndarray) -> Tensor:
    """Return Σ_k row[k] · tensors[k].

    Zero coefficients are left out, and a lone coefficient 1 returns its tensor as it is.
    """
    terms = [(float(c), tensor) for c, tensor in zip(row, tensors) if c != 0]
    if not terms:
        return torch.zeros_like(tensors[0])
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    if len(terms) == 2 and abs(terms[0][0] + terms[1][0] - 1.0) <= SNAP:
        # one pass over the memory
        mixed = torch.lerp(terms[0][1], terms[1][1], terms[1][0])
    elif is_far(np.array([[c for c, _ in terms]]))[0]:
        first = terms[0][1]
        mixed = first + sum((c * (tensor - first) for c, tensor in terms[1:]))
    else:
        return _added(terms)
    # A difference of large numbers may be too large where their sum is not.
    return mixed if _finite(mixed) else _added(terms)


def blended_states(
    points: Sequence[Mapping[str, Tensor]], fixed: Collection[str], rows: np.ndarray
) -> Iterator[dict[str, Tensor]]:
    """Yield the sum of control points for each of many rows of coefficients.

    A sum may be written into the memory of the one before: use it before asking for the next.

    Args:
        points: state dicts; what is no floating point is the first one's.
        fixed: names that are the first one's, too.
        rows: coefficients [T, K].
    """
    first = points[0]
    moving = [name for name in first if first[name].is_floating_point() and name not in fixed]
    columns = [[*map(point.__getitem__, moving)] for point in points]
    memory = [*map(torch.empty_like, columns[0])]
    for row in rows:
        yield {**first, **dict(zip(moving, _blend_all(columns, row, memory)))}


def _blend_all(
    columns: Sequence[list[Tensor]], row: np.ndarray, memory: list[Tensor]
) -> list[Tensor]:
    """Blends many tensors as `blend` does one: in small networks calls take the time.

    Args:
        columns: for each control point, its tensors.
        row: its coefficients.
        memory: to write to.
    """
    terms = [(float(c), column) for c, column in zip(row, columns) if c != 0]
    lone = len(terms) == 1 and terms[0][0] == 1.0
    mixed = len(terms) == 2 and abs(terms[0][0] + terms[1][0] - 1.0) <= SNAP
    far = any(abs(c) > _FAR for c, _ in terms) and is_far(np.array([[c for c, _ in terms]]))[0]
    if not terms or lone or mixed or far:
        return [blend(tensors, row) for tensors in zip(*columns)]
    torch._foreach_copy_(memory, terms[0][1])
    if terms[0][0] != 1.0:
        torch._foreach_mul_(memory, terms[0][0])
    for c, column in terms[1:]:
        torch._foreach_add_(memory, column, alpha=c)
    return memory


def _added(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    total = terms[0][1] * terms[0][0]
    for c, tensor in terms[1:]:
        total.add_(tensor, alpha=c)
    return total


def _finite(tensor: Tensor) -> bool:
    """Whether all is finite, or it is not asked: of a GPU the answer would be waited for."""
    return tensor.device.type != "cpu" or bool(tensor.detach().sum().isfinite())


def is_far(coefficients: np.ndarray) -> np.ndarray:
    """Whether each row of coefficients [T, K] is far out: large ones that sum to 1, bool [T]."""
    largest = np.abs(coefficients).max(1, initial=0.0)
    off = np.abs(coefficients.sum(1) - 1.0)
    far: np.ndarray = (largest > _FAR) & (off <= SNAP * coefficients.shape[1] * largest)
    return far
