"""Affine subspaces: an origin and any number of directions, with ranges of its coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.parameters import state as states
from modeconn.parameters.directions import RandomDirections
from modeconn.parameters.paths import Path, Source
from modeconn.parameters.points import grid_over

_NORMS = ("filter", "layer", None)


class Subspace(Path):
    """The affine subspace origin + Σ_i t_i d_i, with a coordinate of t for each direction d_i.

    With one direction it is a line through the origin, and t is a number. `Plane` is that of two.

    Attributes:
        extent: the range that `grid` covers on each axis, [(low, high), …], by default (-1, 1) on
            each; set it to evaluate another part.

    Args:
        origin: the network at t = 0: a module, a state dict or a checkpoint file.
        directions: state dicts of the origin's shapes; tensors that they leave out are zero.
    """

    def __init__(self, origin: Source, directions: Sequence[Source]) -> None:
        if not isinstance(directions, Sequence) or isinstance(directions, str) or not directions:
            raise ModeconnError(
                f"directions is {directions!r:.60}: expected a list of at least one state dict"
            )
        base = states.load(origin)
        zeros = {key: torch.zeros_like(value) for key, value in base.items()}
        names = ["origin", *(f"direction {i}" for i in range(len(directions)))]
        points = [base, *(zeros | states.load(direction) for direction in directions)]
        super().__init__(points, names=names, directions=True)
        self.dim = len(directions)
        self.extent: list[tuple[float, float]] = [(-1.0, 1.0)] * self.dim

    @classmethod
    def random(
        cls,
        model: Source,
        dim: int = 1,
        *,
        seed: int = 0,
        norm: str | None = "filter",
        biases: bool = False,
        module: nn.Module | None = None,
    ) -> Subspace:
        """Return the subspace around a model along random Gaussian directions.

        With two it is that of `Plane.random`, whose arguments these are.

        Args:
            model: the origin.
            dim: how many directions.
            seed: all directions follow from it.
            norm: "filter", "layer" or None: what of the model the directions are scaled to.
            biases: whether vectors (biases, norms' scales and shifts) move too.
            module: the architecture, where `model` is a state dict or a file.
        """
        if norm not in _NORMS:
            raise ModeconnError(f'norm is {norm!r}: expected "filter", "layer" or None')
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ModeconnError(f"dim is {dim!r}: expected a whole number, at least 1")
        base = states.load(model)
        if isinstance(model, nn.Module):
            module = model
        drawn, generator = (
            RandomDirections(base, norm, biases, module),
            torch.Generator().manual_seed(seed),
        )
        return cls(base, [drawn.draw(generator) for _ in range(dim)])

    def grid(self, count: int | Sequence[int]) -> np.ndarray:
        """Return the t of a grid over `extent`, the last coordinate changing fastest.

        Args:
            count: how many points on each axis, one number for all or one for each.

        Returns:
            float64 [T] with one direction, [T, dim] otherwise. Values [T] of a result are those of
            the grid, by `values.reshape(counts)`.
        """
        t = grid_over(self.extent, count)
        return t[:, 0] if self.dim == 1 else t

    def _basis(self, t: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones(len(t)), t])
