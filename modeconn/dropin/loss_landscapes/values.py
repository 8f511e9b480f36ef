"""A metric's values at points around a model: by the evaluator, by `map`, or in the model's place.

A mean loss over fixed inputs goes to the evaluator. Every other metric runs at every point, on a
copy whose forwards are answered where that is right. A metric that reads the user's own model, and
not what it is given, is run with the weights put there, as the package does; they come back.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends.blocking import MEMORY_BUDGET
from modeconn.capture.trial import duplicate
from modeconn.data.randomness import has_drawn, restorer, torch_states
from modeconn.dropin.loss_landscapes import contract
from modeconn.dropin.loss_landscapes.metrics import Loss
from modeconn.dropin.loss_landscapes.wrappers import module_of, parameters_of, view_of
from modeconn.errors import ModeconnError
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.replay.mapping import map as mapped
from modeconn.evaluation.replay.mapping import naming_point
from modeconn.evaluation.replay.passes import Passes, Setting
from modeconn.evaluation.replay.schedule import worth
from modeconn.metrics.torch_losses import TorchLoss, understood
from modeconn.parameters.paths import Mixture, Path
from modeconn.parameters.state import State, load
from modeconn.parameters.subspace import Subspace

# Points behind the first, which may warm up, that a known loss is timed at as it is.
_TIMED = 1
# So far apart, relative to their size, are two sums of the same losses in float32.
_CLOSE = 2e-5

Metric = Callable[[Any], Any]


class _OwnModel(Exception):
    """A metric ran the user's own model."""


def values_at(
    wrapper: Any, metric: Metric, directions: Sequence[Sequence[Tensor]], t: np.ndarray
) -> list[Any]:
    """Return a metric at points around a model.

    Args:
        wrapper: of the model.
        metric: of a wrapped model.
        directions: each a tensor for every parameter of the wrapper's modules.
        t: coordinates along the directions, in the order of the visits, [T, directions].

    Returns:
        what the metric returns at each of the points.
    """
    contract.tell_of_other_versions()
    module = module_of(wrapper)
    path = _path(module, wrapper, directions)
    points = t if t.shape[1] > 1 else t[:, 0] if t.shape[1] else np.ones(1)
    restore = restorer()
    try:
        if _is_known_loss(metric):
            return _losses(module, wrapper, metric, path, points)
        return [*mapped(_of_views(metric, wrapper), module, path, points, **_OPTIONS)]
    except _OwnModel:
        restore()
        return _in_place(wrapper, metric, path, points)


# buffers stay the start's, whatever they are called: the directions have zeros for them
_OPTIONS: dict[str, Any] = {"buffers": "interpolate", "progress": False}


def _path(module: nn.Module, wrapper: Any, directions: Sequence[Sequence[Tensor]]) -> Path:
    """The affine subspace of some directions around a model; of none, its own point."""
    parameters = parameters_of(wrapper.modules)
    named = {k: v for k, v in module.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    states: list[State] = []
    for direction in directions:
        total: dict[int, Tensor] = {}
        for parameter, part in zip(parameters, direction):
            # a parameter of two of the modules moves twice
            total[id(parameter)] = total.get(id(parameter), 0) + part.to(parameter.device)
        states.append({k: total[id(v)].to(v.dtype) for k, v in named.items() if id(v) in total})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two equal networks the package says nothing either
        return Subspace(load(module), states) if states else Mixture([load(module)])


def _of_views(metric: Metric, wrapper: Any) -> Callable[[nn.Module], Any]:
    """The metric as a function of a copy; the first call looks whether it takes the copy at all."""
    first = True

    def call(module: nn.Module) -> Any:
        nonlocal first
        if not first:
            return metric(view_of(module))
        first = False
        with _watched(wrapper) as seen:
            value = metric(view_of(module))
        if seen:
            raise _OwnModel
        return value

    return call


@contextlib.contextmanager
def _watched(wrapper: Any) -> Iterator[list[nn.Module]]:
    """Yield a list that modules of the user's are added to when they run."""
    seen: list[nn.Module] = []
    whole = getattr(wrapper, "model", None)
    own = [*wrapper.modules, *([whole] if isinstance(whole, nn.Module) else [])]
    hooks = [
        module.register_forward_pre_hook(lambda module, _: seen.append(module)) for module in own
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _in_place(wrapper: Any, metric: Metric, path: Path, points: np.ndarray) -> list[Any]:
    """The metric with the user's own model at each of the points; its weights come back."""
    named = module_of(wrapper).state_dict(keep_vars=True)
    own = {k: v.detach().clone() for k, v in named.items() if isinstance(v, Tensor)}
    path, values = copy.copy(path), []
    # its control points share memory with the model
    path.control_points = list(map(_cloned, path.control_points))
    try:
        for t in points:
            state = path.at(t)
            with torch.no_grad():
                for name in own:
                    named[name].copy_(state[name])
            values.append(metric(wrapper))
    finally:
        with torch.no_grad():
            for name, value in own.items():
                named[name].copy_(value)
    return values


# -- mean losses over fixed inputs -----------------------------------------------------------------


def _is_known_loss(metric: Any) -> bool:
    """Whether a metric is the mean, by PyTorch, of a loss over fixed inputs."""
    package = type(metric).__module__.partition(".")[0] == "loss_landscapes"
    if type(metric) is not Loss and not (package and type(metric).__name__ == "Loss"):
        return False
    if not all(isinstance(value, Tensor) for value in (metric.inputs, metric.target)):
        return False
    try:
        return isinstance(understood(metric.loss_fn), (str, TorchLoss))
    except ModeconnError:
        return False


def _losses(
    module: nn.Module, wrapper: Any, metric: Any, path: Path, points: np.ndarray
) -> list[Any]:
    """The loss at the points: at the first as it is, at the rest by the evaluator if that pays."""
    moved, states, seconds = _Moved(module, path, points), torch_states(), []
    with _watched(wrapper) as seen:
        values = [moved.value(metric, 0)]
    if seen:
        raise _OwnModel
    for number in range(1, min(_TIMED + 1, len(points))):
        started = time.perf_counter()
        values.append(moved.value(metric, number))
        seconds.append(time.perf_counter() - started)
    done = len(values)
    rest = len(points) - done
    if rest and not has_drawn(states) and _pays(module, path, metric, min(seconds) * rest):
        found = _evaluated(module, metric, path, points[done - 1 :])
        if found is not None and abs(found[0] - values[-1]) <= _CLOSE * abs(values[-1]):
            return [*values, *found[1:]]
    return [*values, *(moved.value(metric, number) for number in range(done, len(points)))]


class _Moved:
    """A copy of a module that is moved from point to point, for a loss that only runs it.

    Args:
        module: the user's; it is left alone.
        path: an origin, and directions from it.
        points: on it, as `Path.points` takes them.
    """

    def __init__(self, module: nn.Module, path: Path, points: np.ndarray) -> None:
        made = duplicate(module)
        self._view, self._points = view_of(made), points
        self._coordinates = path.coefficients(points).tolist()
        named = {**dict(made.named_parameters()), **dict(made.named_buffers())}
        origin, *directions = path.control_points
        moving = [name for name in named if name in origin and named[name].is_floating_point()]
        self._own, self._moving = [*named.values()], [named[name] for name in moving]
        self._start = [origin.get(name, value.detach().clone()) for name, value in named.items()]
        self._directions = [[*map(direction.__getitem__, moving)] for direction in directions]

    def value(self, metric: Any, number: int) -> Any:
        """Return the metric at a point."""
        with torch.no_grad():
            torch._foreach_copy_(self._own, self._start)
            for direction, t in zip(self._directions, self._coordinates[number][1:]):
                torch._foreach_add_(self._moving, direction, alpha=t)
        with naming_point(number, self._points[number]):
            return metric(self._view)


def _pays(module: nn.Module, path: Path, metric: Any, seconds: float) -> bool:
    """Whether so many seconds of forwards are worth a capture, if one is needed."""
    like = next(module.parameters())
    setting = Setting(like.dtype, like.device, frozenset(), "auto", MEMORY_BUDGET)
    return not worth(seconds, Passes(module, path, setting), [metric.inputs])


def _evaluated(
    module: nn.Module, metric: Any, path: Path, points: np.ndarray
) -> list[float] | None:
    """The loss at points by the evaluator; None where it does not take model, loss or data."""
    double = next(module.parameters()).dtype == torch.float64
    restore = restorer()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the package says nothing either
            result = evaluate(
                module,
                path,
                (metric.inputs, metric.target),
                points,
                loss=metric.loss_fn,
                metrics=("loss",),
                buffers="start",
                progress=False,
                precision="float64" if double else "float32",
                distributed=False,
            )
    except ModeconnError:
        return None
    finally:
        restore()
    values: list[float] = result.loss.tolist()
    return values


def _cloned(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}
