"""Planes in parameter space: through three networks, along random directions, of a training."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.parameters import state as states
from modeconn.parameters.directions import RandomDirections, principal_plane
from modeconn.parameters.paths import Path, Source, module_of
from modeconn.parameters.points import grid_over


class Plane(Path):
    """The plane origin + x u + y v, with t = (x, y).

    u and v are directions: state dicts of origin's shapes; tensors that they leave out are zero.
    Axes have ranges and counts of their own: `plane.extent = ((-1, 1), (0, 2))`, and
    `points=plane.grid((51, 31))`.
    `Plane.through`, `Plane.random` and `Plane.trajectory` build the planes most often drawn.

    Attributes:
        extent: the range that `points=count` covers on each axis, ((x, x), (y, y)); set it to
            evaluate another part.
        marks: the t of the networks that the plane was made of, [n, 2], which plots show.
        explained: for a trajectory's plane, the share of the squared distances that each axis
            explains.
    """

    dim = 2
    extent: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 1.0), (0.0, 1.0))
    explained: tuple[float, float] | None = None

    def __init__(self, origin: Source, u: Source, v: Source) -> None:
        base = states.load(origin)
        zeros = {key: torch.zeros_like(value) for key, value in base.items()}
        super().__init__(
            [base, zeros | states.load(u), zeros | states.load(v)],
            names=["origin", "u", "v"],
            directions=True,
        )
        self.modules[0] = module_of(origin)
        self._through = False
        self.marks: np.ndarray = np.zeros((1, 2))

    @classmethod
    def through(cls, a: Source, b: Source, c: Source) -> Plane:
        """Return the plane a + x (b - a) + y (c - a).

        a is at (0, 0), b at (1, 0) and c at (0, 1), each bitwise.
        """
        plane = cls.__new__(cls)
        Path.__init__(plane, [a, b, c])
        plane._through = True
        plane.marks = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        return plane

    @classmethod
    def random(
        cls,
        model: Source,
        *,
        seed: int = 0,
        norm: str | None = "filter",
        biases: bool = False,
        module: nn.Module | None = None,
    ) -> Plane:
        """Return the plane through a model along two random Gaussian directions.

        Of a module its parameters move, and none of its buffers. A state dict or a file does not
        say which is which: without `module` all but norms' running statistics move. Names that
        share memory (tied weights) move together.

        Args:
            model: the centre, at t = (0, 0); `points=n` covers [-1, 1]².
            seed: both directions follow from it.
            norm: "filter" scales each filter (row of the first dimension) of a direction to the
                norm of the model's filter, "layer" each tensor to the norm of the model's tensor
                (Li et al. 2018, section 4), None neither.
            biases: whether vectors (biases, norms' scales and shifts) move too; by default they do
                not, nor do norms' running statistics ever.
            module: the architecture, where `model` is a state dict or a file; it says which
                entries are parameters, and which of them are tied.
        """
        if norm not in ("filter", "layer", None):
            raise ModeconnError(f'norm is {norm!r}: expected "filter", "layer" or None')
        base = states.load(model)
        generator = torch.Generator().manual_seed(seed)
        if isinstance(model, nn.Module):
            module = model
        directions = RandomDirections(base, norm, biases, module)
        plane = cls(base, *(directions.draw(generator) for _ in range(2)))
        plane.extent = ((-1.0, 1.0), (-1.0, 1.0))
        plane.modules[0] = module_of(model)
        return plane

    @classmethod
    def trajectory(
        cls, checkpoints: Sequence[Source], *, centre: int = -1, margin: float = 0.2
    ) -> Plane:
        """Return the plane of a training: its checkpoints' first two principal components.

        It passes through one of the checkpoints. Coordinates are distances in parameter space.
        `marks` are the checkpoints, projected onto the plane, and `explained` is the share of their
        spread that the plane shows.

        Args:
            checkpoints: three or more, in the order of the training.
            centre: which of them is the origin, by default the last.
            margin: room around the marks that `points=n` covers, too, as a share of their extent.

        Raises:
            ModeconnError: there are fewer than three checkpoints, or they lie on one line.
        """
        path = Path(checkpoints, least=3)
        if not -len(checkpoints) <= centre < len(checkpoints):
            raise ModeconnError(
                f"centre is {centre}: expected one of the {len(checkpoints)} checkpoints"
            )
        centre %= len(checkpoints)
        u, v, places, explained = principal_plane(path.control_points, centre, path.fixed)
        plane = cls(path.control_points[centre], u, v)
        plane.modules[0] = path.modules[centre]
        plane.marks, plane.explained = places, (float(explained[0]), float(explained[1]))
        low, high = places.min(0), places.max(0)
        room = margin * np.maximum(high - low, 1e-3 * np.ptp(places))
        plane.extent = tuple(zip((low - room).tolist(), (high + room).tolist()))  # type: ignore[assignment]
        return plane

    def grid(self, count: int | Sequence[int]) -> np.ndarray:
        """Return the t of a grid over the extent, y changing fastest; `points=n` is that of n.

        Args:
            count: how many points on each axis, n for n × n or (nx, ny). Values of a result there
                are those of the grid by `values.reshape(nx, ny)`.
        """
        return grid_over(self.extent, count)

    def info(self) -> dict[str, str]:
        """Return what a result records of the plane, as text by name: its marks, too."""
        marks = {"control_points": json.dumps(self.marks.tolist())}
        if self.explained is None:
            return super().info() | marks
        shares = " and ".join(f"{share:.4f}" for share in self.explained)
        return (
            super().info() | marks | {"trajectory": f"{shares} of the squared distances explained"}
        )

    def _basis(self, t: np.ndarray) -> np.ndarray:
        x, y = t[:, 0], t[:, 1]
        return np.stack([1.0 - x - y if self._through else np.ones_like(x), x, y], axis=1)
