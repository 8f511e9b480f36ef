"""Any function of a model at every point of a path, with the model's forwards answered."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.backends import check_name
from modeconn.backends.blocking import MEMORY_BUDGET
from modeconn.errors import ModeconnError, warn
from modeconn.evaluation.arguments import check_fit, frozen_entries, positive
from modeconn.evaluation.progress import Progress, reporting
from modeconn.evaluation.replay.passes import Passes, Setting
from modeconn.evaluation.replay.schedule import Schedule
from modeconn.evaluation.replay.stand_in import StandIn
from modeconn.parameters.blending import blended_states
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points
from modeconn.parameters.state import State
from modeconn.parameters.wrappers import unwrapped

# Bytes for recorded inputs and outputs, and for the answers of a chunk of points.
_KEPT = 1 << 29


class MapResult(Sequence[Any]):
    """Holds what a function returned at points, in their order.

    Attributes:
        t: the points, float64 [T] for a curve, [T, dim] otherwise.
        values: what the function returned, a list.
        info: "forwards" of the model that the function asked for, of which "answered" from planned
            passes and "run"; "changed", the points at which the function changed the weights; and
            "reason", why forwards ran that might have been answered ("" if none did).
    """

    def __init__(self, t: np.ndarray, values: list[Any], info: dict[str, Any]) -> None:
        self.t, self.values, self.info = t, values, info

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __repr__(self) -> str:
        info = self.info
        return (
            f"MapResult({len(self)} points, {info['forwards']:,} forwards, "
            f"{info['answered']:,} of them answered)"
        )


def map(  # noqa: A001
    fn: Callable[[Any], Any],
    model: nn.Module,
    path: Path,
    points: Points = 101,
    *,
    buffers: str = "interpolate",
    replay: bool | None = None,
    backend: str = "auto",
    progress: bool | Progress | None = None,
    memory_budget: int | None = None,
) -> MapResult:
    """Call a function of the model at every point of a path.

    The function is given a copy of the model with the weights of the point, in the model's own
    mode, as it would be in a loop over the points. Where it calls the model on the same inputs at
    every point, the calls are answered from outputs that one planned pass computes for many points.
    A call is answered only if the weights are those of the point, the inputs those that were
    recorded, and planned outputs equal the model's own at the first point of their chunk: what
    draws random numbers, norms in training mode, shuffled data, changed weights and gradients run
    as they are. So does a scan that is over before a capture of the model would pay.

    Args:
        fn: of the model; whatever it returns is kept.
        model: it is left as it was.
        path: of checkpoints that fit the model.
        points: how many points, evenly spaced, or the t values, visited in this order.
        buffers: "interpolate" the norms' running statistics with the weights, or keep those of the
            path's "start".
        replay: True to answer calls wherever they repeat, False never to; None where it pays.
        backend: of the planned passes: "auto", or a backend by name.
        progress: True for a bar, False for none, None for a bar on a terminal, or a callable
            (points done, points in all).
        memory_budget: bytes for what is shared between points in a pass, 128 MiB by default.

    Returns:
        The values in the order of the points. Random states are afterwards as if every forward had
        run.

    Raises:
        ModeconnError: bad input, named in one line, before the first call.
        Exception: what the function raises at a point, with a note that names the point.
    """
    if not callable(fn):
        raise ModeconnError(f"fn is of type {type(fn).__name__}: expected a function of the model")
    own, t = unwrapped(model), path.points(points)
    check_fit(own, path)
    frozen = frozen_entries(buffers, path, data=False)
    first = next(own.parameters(), torch.empty(0))
    check_name(backend, "float64" if first.dtype == torch.float64 else "float32", first.device)
    budget = positive("memory_budget", memory_budget) or MEMORY_BUDGET
    setting = Setting(first.dtype, first.device, frozen, backend, budget)
    schedule = Schedule(Passes(own, path, setting), t, replay, _KEPT)
    scan = _Scan(fn, StandIn(own, _KEPT), path, frozen, schedule)
    rows = path.coefficients(t).numpy()
    states = blended_states(path.control_points, path.fixed, rows)
    with reporting(progress, "points", "map") as report:
        values = []
        for index, (point, state) in enumerate(zip(t, states)):
            values.append(scan.value(index, point, state))
            report(index + 1, len(t))
    return MapResult(t, values, scan.info())


class _Scan:
    """A function on its way over the points."""

    def __init__(
        self,
        fn: Callable[[Any], Any],
        stand_in: StandIn,
        path: Path,
        frozen: frozenset[str],
        schedule: Schedule,
    ) -> None:
        self._fn, self._stand_in, self._schedule = fn, stand_in, schedule
        start = path.control_points[0]
        self._frozen = {name: start[name] for name in frozen}
        self._changed = 0

    def value(self, index: int, point: Any, state: State) -> Any:
        """Return what the function returns at a point, with its parameters and buffers."""
        stand_in, schedule = self._stand_in, self._schedule
        if self._frozen:
            state = state | self._frozen
        stand_in.begin(state, schedule.answers(index), schedule.records(index))
        answered = stand_in.answered
        with naming_point(index, point):
            value = self._fn(stand_in.module)
        if stand_in.changed():
            self._changed += 1
            self._warn_of_change(point)
        schedule.done(index, stand_in.calls, stand_in.answered - answered)
        plain = type(value) in (float, int)
        return value if plain else pytree.tree_map_only(Tensor, self._kept, value)

    def info(self) -> dict[str, Any]:
        """Return what became of the forwards."""
        answered, run = self._stand_in.answered, self._stand_in.run
        return {
            "points": self._schedule.points,
            "forwards": answered + run,
            "answered": answered,
            "run": run,
            "changed": self._changed,
            "reason": self._schedule.reason,
        }

    def _kept(self, tensor: Tensor) -> Tensor:
        """A tensor of the function's value; the next point is loaded into the copy's own."""
        return tensor.detach().clone() if self._stand_in.owns(tensor) else tensor

    def _warn_of_change(self, point: Any) -> None:
        if self._changed == 1:
            warn(
                f"the function changes the model's weights, first at t = {_text(point)}: forwards "
                "after a change run as they are, and every point begins with its own weights"
            )


@contextlib.contextmanager
def naming_point(index: int, point: Any) -> Iterator[None]:
    """Within, an exception is told at which point it was raised; it stays itself."""
    try:
        yield
    except Exception as error:
        text = f"raised at point {index}, t = {_text(point)}, by the function"
        if sys.version_info >= (3, 11):
            error.add_note(text)
        elif error.__cause__ is None:  # shown above the exception, by every Python
            error.__cause__ = ModeconnError(text)
        raise


def _text(point: Any) -> str:
    return str(point.tolist() if isinstance(point, np.ndarray) else float(point))
