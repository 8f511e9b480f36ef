"""Lengths in parameter space: of steps along a path, and of the parameters at its points.

Both follow from the products of the control points with each other, tensor by tensor, so that the
parameters of no point are formed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from modeconn.errors import ModeconnError
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points


class Lengths:
    """Lengths along a path, in float64.

    Args:
        path: the path.
        names: of the tensors that count, such as a network's parameters without its buffers.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        if path.blocks is not None:
            raise ModeconnError(
                f"{path!r} has coefficients of its own for each group or tensor: lengths are those "
                "of paths that move as one"
            )
        self._path = path
        # θ(t) = s p_0 + Σ_{k>0} c_k (p_k - p_0) with s = Σ_k c_k: near points lose no digits
        self._products = np.stack([_products(path, name) for name in names])

    def steps(self, t: Points) -> np.ndarray:
        """Return the distance of each point from the one before it, 0 for the first, [T]."""
        rows = self._rows(t)
        found: np.ndarray = np.sqrt(self._squares(np.diff(rows, axis=0, prepend=rows[:1])).sum(1))
        return found

    def squares(self, t: Points) -> np.ndarray:
        """Return the sum of squares of all parameters at each point, [T]."""
        total: np.ndarray = self._squares(self._rows(t)).sum(1)
        return total

    def norms(self, t: Points) -> np.ndarray:
        """Return the sum, over tensors, of their norms at each point, [T]."""
        total: np.ndarray = np.sqrt(self._squares(self._rows(t))).sum(1)
        return total

    def products(self) -> np.ndarray:
        """Return the products of p_0 and of the differences p_k - p_0, [K, K]."""
        total: np.ndarray = self._products.sum(0)
        return total

    def _rows(self, t: Points) -> np.ndarray:
        c = self._path.coefficients(t).numpy()
        return np.column_stack([c.sum(1), c[:, 1:]])

    def _squares(self, rows: np.ndarray) -> np.ndarray:
        """The square of each tensor's norm for rows of coefficients, [T, tensors]."""
        values: np.ndarray = np.einsum("tk,nkl,tl->tn", rows, self._products, rows)
        return values.clip(0.0)


def _products(path: Path, name: str) -> np.ndarray:
    first, *others = (point[name].detach().double().flatten() for point in path.control_points)
    rows = torch.stack([first, *(other - first for other in others)])
    products: np.ndarray = (rows @ rows.t()).cpu().numpy()
    return products
