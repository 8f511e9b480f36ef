"""Paths in parameter space: control points and a basis, θ(t) = Σ_k c_k(t) θ_k.

A path owns its control points (state dicts). For any t it gives the coefficients of their sum, and
the segment on which t lies, that is, which of them are *active*. Everything else in modeconn works
on those two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.errors import ModeconnError
from modeconn.parameters import state as states
from modeconn.parameters.blending import SNAP, blend
from modeconn.parameters.comparison import checked
from modeconn.parameters.configs import config_of, is_from_file
from modeconn.parameters.directions import RandomDirections, principal_plane
from modeconn.parameters.forking import check_fork
from modeconn.parameters.path_files import PathFile
from modeconn.parameters.points import Points, grid_over, is_count, t_values
from modeconn.parameters.state import State
from modeconn.parameters.wrappers import name_of, unwrapped

# A control point: a module, a state dict or the name of a checkpoint file.
Source = Any


class Path:
    """A family of parameters θ(t) = Σ_k c_k(t) θ_k.

    Attributes:
        control_points: K state dicts with equal keys, shapes and dtypes.
        dim: the number of coordinates of t (1 for a curve, 2 for a plane, K for a mixture).
        names: what messages call the control points.
        fixed: names of masks, which are those of the first control point everywhere.
        prefixes: that were removed from the names in files.
        modules: the modules that control points are the parameters and buffers of, None for others.
        files: whether control points were read from files; configs: of their folders, or None.
        unmatched: why control points do not match yet, where a module may tie the names that some
            files leave out; None where they match.
        tracked: per control point the tensors of a state dict that require gradients.

    The tensors of modules and state dicts are not copied: a path follows a model that is trained
    further. Tensors that are not floating point (counters such as `num_batches_tracked`) are not
    interpolated: everywhere they are those of the first control point. Half precision is widened to
    float32.

    Args:
        control_points: modules, state dicts or names of checkpoint files.
        names: what messages call them; by default the file names.
        least: the fewest control points.
        directions: whether all but the first are directions, and no networks.

    Control points that are equal, and masks and other integers that differ, are warned of.
    """

    dim = 1
    _in_turn = False  # whether it goes from one control point to the next

    def __init__(
        self,
        control_points: Sequence[Source],
        names: Sequence[str] | None = None,
        least: int = 2,
        directions: bool = False,
    ) -> None:
        check_fork()
        if isinstance(control_points, (str, Mapping, nn.Module)) or not isinstance(
            control_points, Sequence
        ):
            raise ModeconnError(
                f"{type(self).__name__} takes a list of control points, "
                f"got {type(control_points).__name__}"
            )
        if len(control_points) < least:
            raise ModeconnError(
                f"{type(self).__name__} needs at least {least} control points, "
                f"got {len(control_points)}"
            )
        names = names or [name_of(source, k) for k, source in enumerate(control_points)]
        loaded = [states.load_with_prefix(source) for source in control_points]
        self.control_points: list[State] = [states.widened(state) for state, _ in loaded]
        self.prefixes = {prefix for _, prefix in loaded}
        self.names, self.directions = list(names), directions
        self.modules = [_module(source) for source in control_points]
        self.files = list(map(is_from_file, control_points))
        self.configs = [config_of(source) for source in control_points]
        self.tracked = [states.tracked(source) for source in control_points]
        self.fixed: frozenset[str] = frozenset()
        self.unmatched = states.left_out(self.control_points, self.names, self.files)
        if self.unmatched is None:
            self.settle()

    def settle(self) -> None:
        """Check that the control points match, and warn of those that are not what they seem."""
        self.unmatched = None
        self.fixed = checked(self.control_points, self.names, self.directions, self._in_turn)

    # -- what a kind of path defines ---------------------------------------------------------------

    def _basis(self, t: np.ndarray) -> np.ndarray:
        """Return the coefficients [T, K] at t ([T] or [T, dim], float64)."""
        raise NotImplementedError

    def segment_of(self, t: np.ndarray) -> np.ndarray:
        """Return the segment on which each t lies, int [T].

        All t of a segment share their active control points.
        """
        return np.zeros(len(t), np.int64)

    def grid(self, count: int) -> np.ndarray:
        """Return the t values that `points=count` stands for: evenly spaced over [0, 1]."""
        return np.linspace(0.0, 1.0, count)

    # -- what every path offers --------------------------------------------------------------------

    def points(self, points: Points) -> np.ndarray:
        """Check points, and fill in the t values where they are a count.

        Returns:
            float64 [T] for a curve, [T, dim] otherwise.

        Raises:
            ModeconnError: a count below one, no values, values that are not finite, or of the wrong
                shape.
        """
        if is_count(points):
            if points < 1:
                raise ModeconnError(f"points is {points}: at least one point is needed")
            return self.grid(int(points))
        return t_values(points, self.dim, type(self).__name__)

    def coefficients(self, t: Points) -> Tensor:
        """Return the coefficients c_k(t) of the control points, float64 [T, K]."""
        return torch.from_numpy(self._basis(self.points(t)))

    def at(self, t: Points) -> State:
        """Return the parameters and buffers at one t, in the control points' dtype.

        Where one control point has coefficient 1 and all others 0 (at end points, and at the
        breakpoints of a chain) its tensors are returned as they are, bit for bit.
        """
        values = self.points([t] if self.dim == 1 and np.ndim(t) == 0 else t)
        if self.unmatched is not None:
            raise ModeconnError(f"{self.unmatched}: evaluate on the module fills in tied names")
        if len(values) != 1:
            raise ModeconnError(f"at() takes one t, got {len(values)}")
        row = self._basis(values)[0]
        state = {}
        for key, first in self.control_points[0].items():
            tensors = [point[key] for point in self.control_points]
            moves = first.is_floating_point() and key not in self.fixed
            state[key] = blend(tensors, row) if moves else first
        return state

    def info(self) -> dict[str, str]:
        """Return what a result records of the path, as text by name."""
        return {"path": repr(self)}

    def __repr__(self) -> str:
        count = sum(v.numel() for v in self.control_points[0].values() if v.is_floating_point())
        points = f"{len(self.control_points)} control points"
        return f"{type(self).__name__}({points}, {count:,} numbers each)"


class Line(PathFile, Path):
    """The straight line (1 - t) a + t b; t outside [0, 1] extrapolates."""

    def __init__(self, a: Source, b: Source) -> None:
        super().__init__([a, b])

    def _basis(self, t: np.ndarray) -> np.ndarray:
        return np.stack([1.0 - t, t], axis=1)


class PolyChain(PathFile, Path):
    """Line segments through p_0 … p_n, of equal length in t.

    t outside [0, 1] extends the first or the last segment.
    """

    _in_turn = True

    @property
    def segments(self) -> int:
        """The number of segments, one less than that of control points."""
        return len(self.control_points) - 1

    def _scaled(self, t: np.ndarray) -> np.ndarray:
        scaled = t * self.segments
        nearest = np.round(scaled)
        close = np.abs(scaled - nearest) <= SNAP * np.maximum(1.0, np.abs(nearest))
        return np.where(close, nearest, scaled)

    def segment_of(self, t: np.ndarray) -> np.ndarray:
        """Return the segment on which each t lies; a breakpoint lies on the one that it begins."""
        segment: np.ndarray = np.clip(np.floor(self._scaled(t)), 0, self.segments - 1)
        return segment.astype(np.int64)

    def _basis(self, t: np.ndarray) -> np.ndarray:
        segment, rows = self.segment_of(t), np.arange(len(t))
        u = self._scaled(t) - segment
        c = np.zeros((len(t), len(self.control_points)))
        c[rows, segment] = 1.0 - u
        c[rows, segment + 1] = u
        return c


class Bezier(PathFile, Path):
    """The Bézier curve Σ_k binomial(n, k) (1 - t)^(n-k) t^k p_k (Garipov et al. 2018, eq. 5).

    t outside [0, 1] extrapolates.
    """

    _in_turn = True

    def _basis(self, t: np.ndarray) -> np.ndarray:
        n = len(self.control_points) - 1
        columns = [math.comb(n, k) * (1.0 - t) ** (n - k) * t**k for k in range(n + 1)]
        return np.stack(columns, axis=1)


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
        self.modules[0] = _module(origin)
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
        plane.modules[0] = _module(model)
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


class Mixture(PathFile, Path):
    """Free coefficients: t = (c_0, …, c_n), θ(t) = Σ_k c_k p_k.

    For model soups and task arithmetic; with one-hot t, for networks that have nothing to do with
    each other.
    """

    def __init__(self, control_points: Sequence[Source]) -> None:
        super().__init__(control_points, least=1)
        self.dim = len(self.control_points)

    def points(self, points: Points) -> np.ndarray:
        """Check coefficients [T, K]; a count of points is refused, as there is no default grid.

        Raises:
            ModeconnError: a count, no values, values that are not finite, or of the wrong shape.
        """
        if isinstance(points, (int, np.integer)):
            raise ModeconnError(
                f"points is {points}: expected coefficients [T, {self.dim}], "
                "as a Mixture has no default grid"
            )
        return super().points(points)

    def _basis(self, t: np.ndarray) -> np.ndarray:
        return np.array(t, np.float64).reshape(len(t), self.dim)


def _module(source: Source) -> nn.Module | None:
    return unwrapped(source) if isinstance(source, nn.Module) else None
