"""Paths in parameter space: control points and a basis, θ(t) = Σ_k c_k(t) θ_k.

A path owns its control points (state dicts) and says, for any t, with which coefficients they are
added up and which of them are *active*, that is, on which segment t lies. Everything else in
modeconn works on those two.
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
from modeconn.parameters.state import State
from modeconn.parameters.trajectory import principal_plane

# What t, a count of points or a sequence of values, may be given as.
Points = Any
# What a control point may be given as.
Source = Any

# t * segments within this many rounding errors of a whole number is that breakpoint, so that t = i
# / n hits it bitwise.
_SNAP = 4 * float(np.finfo(np.float64).eps)


class Path:
    """A family of parameters θ(t) = Σ_k c_k(t) θ_k.

    Attributes:
        control_points: K state dicts with equal keys, shapes and dtypes.
        dim: how many numbers make one t (1 for a curve, 2 for a plane, K for a mixture).

    The tensors of modules and state dicts are not copied: train a model on, and a path through it
    follows. Entries that are not floating point (counters such as `num_batches_tracked`) are not
    interpolated: they are those of the first control point everywhere. Those in half precision are
    taken as float32.
    """

    dim = 1

    def __init__(
        self, control_points: Sequence[Source], names: Sequence[str] | None = None, least: int = 2
    ) -> None:
        if isinstance(control_points, (str, Mapping, nn.Module)) or not isinstance(
            control_points, Sequence
        ):
            raise ModeconnError(
                f"{type(self).__name__} takes a list of control points, got {type(control_points).__name__}"
            )
        if len(control_points) < least:
            raise ModeconnError(
                f"{type(self).__name__} needs at least {least} control points, got {len(control_points)}"
            )
        names = names or [_name(source, k) for k, source in enumerate(control_points)]
        self.control_points: list[State] = [
            _widened(states.load(source)) for source in control_points
        ]
        states.match(self.control_points, names)
        for point, name in zip(self.control_points, names):
            states.check(point, name)
        self.names = list(names)

    # -- what a kind of path defines ---------------------------------------------------------------

    def _basis(self, t: np.ndarray) -> np.ndarray:
        """Coefficients [T, K] at t ([T] or [T, dim], float64)."""
        raise NotImplementedError

    def segment_of(self, t: np.ndarray) -> np.ndarray:
        """The segment on which each t lies, int [T]. Two t's on one segment share their active control points."""
        return np.zeros(len(t), np.int64)

    def grid(self, count: int) -> np.ndarray:
        """The t values that `points=count` stands for: evenly spaced over [0, 1]."""
        return np.linspace(0.0, 1.0, count)

    # -- what every path offers --------------------------------------------------------------------

    def points(self, points: Points) -> np.ndarray:
        """Check and complete what the user gave as points: a count, or the t values themselves.

        Returns:
            float64 [T] for a curve, [T, dim] otherwise.

        Raises:
            ModeconnError: a count below one, no values, values that are not finite, or of the wrong
                shape.
        """
        if isinstance(points, (int, np.integer)) and not isinstance(points, bool):
            if points < 1:
                raise ModeconnError(f"points is {points}: at least one point is needed")
            return self.grid(int(points))
        try:
            t = np.asarray(
                points.detach().cpu() if isinstance(points, Tensor) else points, dtype=np.float64
            )
        except (TypeError, ValueError):
            raise ModeconnError(f"points must be a count or numbers, got {points!r}") from None
        if t.ndim == (0 if self.dim == 1 else 1):
            t = t[None]
        elif self.dim == 1 and t.ndim == 2 and t.shape[1] == 1:
            t = t[:, 0]
        expected = "[T]" if self.dim == 1 else f"[T, {self.dim}]"
        if t.size == 0:
            raise ModeconnError(f"points is empty: expected t values of shape {expected}")
        if t.ndim != (1 if self.dim == 1 else 2) or (self.dim > 1 and t.shape[1] != self.dim):
            raise ModeconnError(
                f"points has shape {list(t.shape)}: {type(self).__name__} expects {expected}"
            )
        if not np.isfinite(t).all():
            row = int(np.argmin(np.isfinite(t).reshape(len(t), -1).all(1)))
            raise ModeconnError(f"points[{row}] is {t[row]}: t must be finite")
        return t

    def coefficients(self, t: Points) -> Tensor:
        """Coefficients c_k(t) of the control points, float64 [T, K]."""
        return torch.from_numpy(self._basis(self.points(t)))

    def at(self, t: Points) -> State:
        """The parameters at one t, in the control points' dtype.

        Where one control point has coefficient 1 and all others 0 (the end points, and breakpoints
        of a chain) its tensors are returned as they are: no rounding, not even of -0.0 or a
        subnormal.
        """
        values = self.points([t] if self.dim == 1 and np.ndim(t) == 0 else t)
        if len(values) != 1:
            raise ModeconnError(f"at() takes one t, got {len(values)}")
        row = self._basis(values)[0]
        first = self.control_points[0]
        return {
            key: blend([point[key] for point in self.control_points], row)
            if first[key].is_floating_point()
            else first[key]
            for key in first
        }

    def info(self) -> dict[str, str]:
        """Returns facts of the path to keep with a result, as text by name."""
        return {"path": repr(self)}

    def __repr__(self) -> str:
        count = sum(v.numel() for v in self.control_points[0].values() if v.is_floating_point())
        return f"{type(self).__name__}({len(self.control_points)} control points, {count:,} numbers each)"


def blend(tensors: Sequence[Tensor], row: Sequence[float] | np.ndarray) -> Tensor:
    """Σ_k row[k] · tensors[k]; zero coefficients are left out and a lone coefficient 1 returns its tensor as it is."""
    terms = [(float(c), tensor) for c, tensor in zip(row, tensors) if c != 0]
    if not terms:
        return torch.zeros_like(tensors[0])
    if len(terms) == 1 and terms[0][0] == 1.0:
        return terms[0][1]
    if len(terms) == 2 and abs(terms[0][0] + terms[1][0] - 1.0) <= _SNAP:
        return torch.lerp(terms[0][1], terms[1][1], terms[1][0])  # one pass over the memory
    total = terms[0][1] * terms[0][0]
    for c, tensor in terms[1:]:
        total.add_(tensor, alpha=c)
    return total


class Line(Path):
    """The straight line (1 - t) a + t b; t outside [0, 1] extrapolates."""

    def __init__(self, a: Source, b: Source) -> None:
        super().__init__([a, b])

    def _basis(self, t: np.ndarray) -> np.ndarray:
        return np.stack([1.0 - t, t], axis=1)


class PolyChain(Path):
    """Line segments through p_0 … p_n, of equal length in t; t outside [0, 1] extends the first or last segment."""

    @property
    def segments(self) -> int:
        """The number of segments, one less than of control points."""
        return len(self.control_points) - 1

    def _scaled(self, t: np.ndarray) -> np.ndarray:
        scaled = t * self.segments
        nearest = np.round(scaled)
        return np.where(
            np.abs(scaled - nearest) <= _SNAP * np.maximum(1.0, np.abs(nearest)), nearest, scaled
        )

    def segment_of(self, t: np.ndarray) -> np.ndarray:
        segment: np.ndarray = np.clip(np.floor(self._scaled(t)), 0, self.segments - 1).astype(
            np.int64
        )
        return segment

    def _basis(self, t: np.ndarray) -> np.ndarray:
        segment, rows = self.segment_of(t), np.arange(len(t))
        u = self._scaled(t) - segment
        c = np.zeros((len(t), len(self.control_points)))
        c[rows, segment] = 1.0 - u
        c[rows, segment + 1] = u
        return c


class Bezier(Path):
    """The Bézier curve Σ_k binomial(n, k) (1 - t)^(n-k) t^k p_k (Garipov et al. 2018, eq. 5); t outside [0, 1] extrapolates."""

    def _basis(self, t: np.ndarray) -> np.ndarray:
        n = len(self.control_points) - 1
        return np.stack(
            [math.comb(n, k) * (1.0 - t) ** (n - k) * t**k for k in range(n + 1)], axis=1
        )


class Plane(Path):
    """The plane origin + x u + y v, with t = (x, y).

    u and v are directions: state dicts of origin's shapes; entries that they leave out are zero.
    `Plane.through`, `Plane.random` and `Plane.trajectory` build the planes most often drawn.

    Attributes:
        extent: what `points=count` covers along each axis, ((x, x), (y, y)); set it to look at
            another part.
        marks: the t of the networks that the plane was made of, [n, 2], which plots show.
        explained: of a trajectory's plane, which share of the squared distances each axis explains.
    """

    dim = 2
    extent: tuple[tuple[float, float], tuple[float, float]] = ((0.0, 1.0), (0.0, 1.0))
    explained: tuple[float, float] | None = None

    def __init__(self, origin: Source, u: Source, v: Source) -> None:
        base = states.load(origin)
        zeros = {key: torch.zeros_like(value) for key, value in base.items()}
        super().__init__(
            [base, zeros | states.load(u), zeros | states.load(v)], names=["origin", "u", "v"]
        )
        self._through = False
        self.marks: np.ndarray = np.zeros((1, 2))

    @classmethod
    def through(cls, a: Source, b: Source, c: Source) -> Plane:
        """The plane a + x (b - a) + y (c - a): a at (0, 0), b at (1, 0) and c at (0, 1), each bitwise."""
        plane = cls.__new__(cls)
        Path.__init__(plane, [a, b, c])
        plane._through = True
        plane.marks = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        return plane

    @classmethod
    def random(
        cls, model: Source, *, seed: int = 0, norm: str | None = "filter", biases: bool = False
    ) -> Plane:
        """The plane through a model along two random Gaussian directions.

        Args:
            model: the centre, at t = (0, 0); `points=n` covers [-1, 1]².
            seed: both directions follow from it.
            norm: "filter" scales each filter (row of the first dimension) of a direction to the
                norm of the model's filter, "layer" each tensor to the norm of the model's tensor
                (Li et al. 2018, section 4), None neither.
            biases: whether vectors (biases, norms' scales and shifts) move too; by default they do
                not, nor do norms' running statistics ever.
        """
        if norm not in ("filter", "layer", None):
            raise ModeconnError(f'norm is {norm!r}: expected "filter", "layer" or None')
        base = states.load(model)
        generator = torch.Generator().manual_seed(seed)
        plane = cls(base, *(_random_direction(base, generator, norm, biases) for _ in range(2)))
        plane.extent = ((-1.0, 1.0), (-1.0, 1.0))
        return plane

    @classmethod
    def trajectory(
        cls, checkpoints: Sequence[Source], *, centre: int = -1, margin: float = 0.2
    ) -> Plane:
        """The plane through one of a training's checkpoints along the first two principal components of all of them.

        Coordinates are distances in parameter space. The checkpoints' places in the plane are in
        `marks`, and `explained` says how much of their spread it shows: what is off the plane is
        projected away.

        Args:
            checkpoints: three or more, in the order of the training.
            centre: which of them is the origin, by default the last.
            margin: `points=n` covers all marks and so much more on each side, as a share of their
                extent.

        Raises:
            ModeconnError: fewer than three, or such as lie on one line.
        """
        path = Path(checkpoints, least=3)
        if not -len(checkpoints) <= centre < len(checkpoints):
            raise ModeconnError(
                f"centre is {centre}: expected one of the {len(checkpoints)} checkpoints"
            )
        u, v, places, explained = principal_plane(path.control_points, centre % len(checkpoints))
        plane = cls(path.control_points[centre], u, v)
        plane.marks, plane.explained = places, (float(explained[0]), float(explained[1]))
        low, high = places.min(0), places.max(0)
        room = margin * np.maximum(high - low, 1e-3 * np.ptp(places))
        plane.extent = tuple(zip((low - room).tolist(), (high + room).tolist()))  # type: ignore[assignment]
        return plane

    def grid(self, count: int) -> np.ndarray:
        x, y = np.meshgrid(*(np.linspace(*ends, count) for ends in self.extent), indexing="ij")
        return np.stack([x.ravel(), y.ravel()], axis=1)

    def info(self) -> dict[str, str]:
        marks = {"control_points": json.dumps(self.marks.tolist())}
        if self.explained is None:
            return super().info() | marks
        shares = " and ".join(f"{share:.4f}" for share in self.explained)
        return super().info() | marks | {"trajectory": f"{shares} of the squared distances explained"}

    def _basis(self, t: np.ndarray) -> np.ndarray:
        x, y = t[:, 0], t[:, 1]
        return np.stack([1.0 - x - y if self._through else np.ones_like(x), x, y], axis=1)


class Mixture(Path):
    """Free coefficients: t = (c_0, …, c_n), θ(t) = Σ_k c_k p_k.

    For model soups and task arithmetic; with one-hot t, for networks that have nothing to do with
    each other.
    """

    def __init__(self, control_points: Sequence[Source]) -> None:
        super().__init__(control_points, least=1)
        self.dim = len(self.control_points)

    def points(self, points: Points) -> np.ndarray:
        if isinstance(points, (int, np.integer)):
            raise ModeconnError(
                f"points is {points}: a Mixture has no default grid, give coefficients [T, {self.dim}]"
            )
        return super().points(points)

    def _basis(self, t: np.ndarray) -> np.ndarray:
        return np.array(t, np.float64).reshape(len(t), self.dim)


def _widened(state: State) -> State:
    """Entries in half precision as float32, which has all their values; the others as they are."""
    half = (torch.float16, torch.bfloat16)
    return {key: value.float() if value.dtype in half else value for key, value in state.items()}


def _random_direction(
    base: State, generator: torch.Generator, norm: str | None, biases: bool
) -> State:
    direction = {}
    for key, value in base.items():
        moves = value.is_floating_point() and not key.endswith(("running_mean", "running_var"))
        if not moves or (value.dim() <= 1 and not biases):
            continue
        d = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        w = value.detach().double().cpu()
        if norm == "layer" or (norm == "filter" and w.dim() <= 1):
            d *= w.norm() / d.norm().clamp_min(1e-10)
        elif norm == "filter":
            axes = tuple(range(1, w.dim()))
            norms = [torch.linalg.vector_norm(v, dim=axes, keepdim=True) for v in (w, d)]
            d *= norms[0] / norms[1].clamp_min(1e-10)
        direction[key] = d.to(value)
    return direction


def _name(source: Source, k: int) -> str:
    return (
        str(source)
        if isinstance(source, (str, bytes)) or hasattr(source, "__fspath__")
        else f"control point {k}"
    )
