"""The contract of loss_landscapes 3.0.6: where its points lie, and how its directions are made.

It was found by running the package. Versions 4 and later have other rules; where one of them is
installed, that is said once, since its own figures differ from these.

A line has the points t = (i + 1) / steps: the start is never one of them. Planes have data[i, j]
with i along the first direction. They are walked to and fro: rows of even i ascend, with offsets
1 … steps along the second direction, rows of odd i descend, with offsets steps - 1 … 0, so that the
rows are shifted against each other. `fixed=True` has offsets 0 … steps - 1 in every row.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from modeconn.errors import ModeconnError, warn

VERSION = "3.0.6"
NORMALIZATIONS = ("filter", "layer", "model", None)


def installed() -> str | None:
    """Return the version of the package beside this one; None where it is not installed."""
    try:
        return importlib.metadata.version("loss-landscapes")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def tell_of_other_versions() -> None:
    """Warn, once, of an installed version whose rules are not those of this module."""
    found = installed()
    if found is not None and not found.startswith("3."):
        warn(
            f"loss_landscapes {found} is installed, and modeconn.dropin.loss_landscapes keeps the "
            f"rules of {VERSION}: directions, coordinates and scales differ"
        )


# -- points ----------------------------------------------------------------------------------------


def checked_steps(steps: int) -> int:
    """Return a number of steps, at least 1."""
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ModeconnError(f"steps is {steps!r}: expected a whole number, at least 1")
    return int(steps)


def line_offsets(steps: int) -> np.ndarray:
    """Return the points of a line in steps from its start, [steps]."""
    return np.arange(1.0, steps + 1)


def plane_walk(steps: int, fixed: bool) -> Iterator[tuple[int, int, float, float]]:
    """Yield a plane's points in the order in which they are visited.

    Returns:
        row, column, and the steps along the first and the second direction.
    """
    for i in range(steps):
        for j in range(steps) if i % 2 == 0 or fixed else reversed(range(steps)):
            yield i, j, float(i), float(j + 1 if i % 2 == 0 and not fixed else j)


# -- directions ------------------------------------------------------------------------------------

Tensors = Sequence[Tensor]


def drawn(like: Tensors, fixed: bool) -> list[Tensor]:
    """Draw a direction from the global generator: uniform in [0, 1), or Gaussian if fixed."""
    draw = torch.randn if fixed else torch.rand
    return [draw(tensor.shape, dtype=like[0].dtype) for tensor in like]


def orthogonal_to(direction: Tensors, fixed: bool) -> list[Tensor]:
    """Draw a direction, and subtract its projection on another."""
    other = drawn(direction, fixed)
    share = _dot(other, direction) / max(_dot(direction, direction), math.ulp(0.0))
    return [b - share * a for b, a in zip(other, direction)]


def normalized(direction: Tensors, weights: Tensors, how: str | None) -> list[Tensor]:
    """Scale a direction to a network's weights.

    Args:
        direction: a tensor for each of the weights.
        weights: the network's, in the same order.
        how: "filter": vectors take the weights' own sizes, with the signs of the direction, all
            else the norm of each row; "layer": each tensor takes the norm of the weights'; "model":
            tensor after tensor is scaled by the ratio of the norms of all, those before it scaled
            already; None: nothing.

    Raises:
        AttributeError: `how` is none of these, as the package raises it.
    """
    if how not in NORMALIZATIONS:
        raise AttributeError(
            f"normalization is {how!r}: expected {', '.join(map(repr, NORMALIZATIONS))}"
        )
    if how is None:
        return list(direction)
    if how == "model":
        return _by_model(direction, weights)
    if how == "layer":
        return [d * _ratio(_norm(w), _norm(d)) for d, w in zip(direction, weights)]
    return [_by_filter(d, w) for d, w in zip(direction, weights)]


def scaled(direction: Tensors, weights: Tensors, distance: float, fixed: bool) -> list[Tensor]:
    """Scale a direction to the length of the whole scan: ‖θ‖ / distance, or ‖θ‖ · distance."""
    length = model_norm(weights) * distance if fixed else model_norm(weights) / distance
    factor = _ratio(length, model_norm(direction))
    return [d * factor for d in direction]


def model_norm(tensors: Tensors) -> float:
    """Return the Euclidean norm over all tensors."""
    return math.sqrt(_dot(tensors, tensors))


def _by_model(direction: Tensors, weights: Tensors) -> list[Tensor]:
    length, squares = model_norm(weights), [_norm(d) ** 2 for d in direction]
    result = []
    for i, d in enumerate(direction):
        factor = _ratio(length, math.sqrt(sum(squares)))
        squares[i] *= factor**2
        result.append(d * factor)
    return result


def _by_filter(d: Tensor, w: Tensor) -> Tensor:
    w = w.to(d.device)
    if w.dim() == 0:
        return d * _ratio(_norm(w), _norm(d))
    if w.dim() == 1:
        return d.sign() * w.abs()
    axes = tuple(range(1, w.dim()))
    have, want = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (d, w))
    return d * torch.where(have > 0, want / have, 0.0)


def _ratio(one: float, other: float) -> float:
    """A quotient of norms; a direction that is zero stays zero."""
    return one / other if other else 0.0


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _dot(one: Tensors, other: Tensors) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(one, other))
