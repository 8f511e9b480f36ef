"""Paths in parameter space: control points and a basis, θ(t) = Σ_k c_k(t) θ_k.

A path owns its control points (state dicts). For any t it gives the coefficients of their sum, and
the segment on which t lies, that is, which of them are *active*. Everything else in modeconn works
on those two.
"""

from __future__ import annotations

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
from modeconn.parameters.forking import check_fork
from modeconn.parameters.groups import Blocks, Groups, Patterns
from modeconn.parameters.path_files import PathFile
from modeconn.parameters.points import Points, is_count, t_values
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
        groups: of parameters that have a t of their own each; None where all move together.
        blocks: entries that share their coefficients, where not all do; None otherwise.

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
    groups: Groups | None = None
    blocks: Blocks | None = None
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
        self.modules = [module_of(source) for source in control_points]
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
            grid = self.grid(int(points))
            return grid if self.groups is None else self.groups.together(grid)
        if self.groups is not None:
            points = self.groups.flat(points)
        return t_values(points, self.dim, type(self).__name__)

    def coefficients(self, t: Points) -> Tensor:
        """Return the coefficients c_k(t) of the control points, float64 [T, K].

        Where entries move apart they are those of each of the B blocks, [T, B · K].
        """
        return torch.from_numpy(self._coefficients(self.points(t)))

    def _coefficients(self, t: np.ndarray) -> np.ndarray:
        if self.groups is None:
            return self._basis(t)
        return np.concatenate([self._basis(each) for each in self.groups.split(t)], axis=1)

    def segments_at(self, t: np.ndarray) -> np.ndarray:
        """Return the segment on which each t lies, of all groups together, int [T]."""
        if self.groups is None:
            return self.segment_of(t)
        found = np.stack([self.segment_of(each) for each in self.groups.split(t)], axis=1)
        segments: np.ndarray = np.unique(found, axis=0, return_inverse=True)[1].reshape(-1)
        return segments

    def check_names(self) -> None:
        """Raise where names of the control points do not match before the module is known."""
        if self.unmatched is not None:
            raise ModeconnError(
                f"{self.unmatched}: to move parts of it apart, save both with the same names first"
            )

    def move_apart(self, groups: Patterns | None) -> None:
        """Let groups of entries have a t of their own; all others stay at the first point."""
        if groups is None:
            return
        self.check_names()
        self.groups = Groups.read(groups, self.control_points[0], self.dim)
        self.dim *= len(self.groups.names)
        self.blocks = Blocks(self.groups.of, len(self.control_points))
        self.fixed |= self.control_points[0].keys() - self.groups.of.keys()

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
        row = self._coefficients(values)[0]
        state = {}
        for key, first in self.control_points[0].items():
            tensors = [point[key] for point in self.control_points]
            moves = first.is_floating_point() and key not in self.fixed
            own = row if self.blocks is None or not moves else row[self.blocks.columns(key)]
            state[key] = blend(tensors, own) if moves else first
        return state

    def info(self) -> dict[str, str]:
        """Return what a result records of the path, as text by name."""
        return {"path": repr(self)}

    def __repr__(self) -> str:
        count = sum(v.numel() for v in self.control_points[0].values() if v.is_floating_point())
        points = f"{len(self.control_points)} control points"
        groups = "" if self.groups is None else f", {len(self.groups.names)} groups"
        return f"{type(self).__name__}({points}, {count:,} numbers each{groups})"


class Line(PathFile, Path):
    """The straight line (1 - t) a + t b; t outside [0, 1] extrapolates.

    Args:
        a, b: the networks at t = 0 and at t = 1.
        groups: patterns of entries that have a t of their own each, so that points are [T, G]:
            a list, or a dict by name, of prefixes of modules ("layers.0"), regular expressions
            (r".*\\.bias") or lists of them. "*" takes what no other group has; entries of no group
            are those of a. `points=count` moves all groups together.
    """

    def __init__(self, a: Source, b: Source, *, groups: Patterns | None = None) -> None:
        super().__init__([a, b])
        self.move_apart(groups)

    def _basis(self, t: np.ndarray) -> np.ndarray:
        return np.stack([1.0 - t, t], axis=1)


class PolyChain(PathFile, Path):
    """Line segments through p_0 … p_n, of equal length in t.

    t outside [0, 1] extends the first or the last segment.

    Args:
        control_points: two or more networks.
        names: what messages call them; by default the file names.
        groups: patterns of entries with a t of their own each, as for `Line`.
    """

    _in_turn = True

    def __init__(
        self,
        control_points: Sequence[Source],
        names: Sequence[str] | None = None,
        *,
        groups: Patterns | None = None,
    ) -> None:
        super().__init__(control_points, names)
        self.move_apart(groups)

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

    Args:
        control_points: two or more networks.
        names: what messages call them; by default the file names.
        groups: patterns of entries with a t of their own each, as for `Line`.
    """

    _in_turn = True

    def __init__(
        self,
        control_points: Sequence[Source],
        names: Sequence[str] | None = None,
        *,
        groups: Patterns | None = None,
    ) -> None:
        super().__init__(control_points, names)
        self.move_apart(groups)

    def _basis(self, t: np.ndarray) -> np.ndarray:
        n = len(self.control_points) - 1
        columns = [math.comb(n, k) * (1.0 - t) ** (n - k) * t**k for k in range(n + 1)]
        return np.stack(columns, axis=1)


class Mixture(PathFile, Path):
    """Free coefficients: t = (c_0, …, c_n), θ(t) = Σ_k c_k p_k.

    For model soups and task arithmetic; with one-hot t, for networks that have nothing to do with
    each other (`States`).

    Args:
        control_points: one network or more.
        groups: patterns of entries with coefficients of their own each, as for `Line`; points are
            [T, G, K] then, or [T, G · K].
    """

    def __init__(self, control_points: Sequence[Source], *, groups: Patterns | None = None) -> None:
        super().__init__(control_points, least=1)
        self.dim = len(self.control_points)
        self.move_apart(groups)

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
        return np.array(t, np.float64).reshape(len(t), len(self.control_points))


def module_of(source: Source) -> nn.Module | None:
    """Return the module that a control point is given as, without wrappers; None for others."""
    return unwrapped(source) if isinstance(source, nn.Module) else None
