"""The five functions: a metric at one point, along lines, and over planes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.dropin.loss_landscapes import contract
from modeconn.dropin.loss_landscapes.values import values_at
from modeconn.dropin.loss_landscapes.wrappers import parameters_of, wrapped
from modeconn.errors import ModeconnError

Metric = Callable[[Any], Any]


def point(model: Any, metric: Metric) -> Any:
    """Return a metric of a model as it is.

    Args:
        model: a module, or a wrapper.
        metric: of the wrapped model.
    """
    return values_at(wrapped(model), metric, [], np.zeros((1, 0)))[0]


def linear_interpolation(
    model_start: Any,
    model_end: Any,
    metric: Metric,
    steps: int = 100,
    deepcopy_model: bool = False,
    *,
    fixed: bool = False,
) -> np.ndarray:
    """Return a metric along the line between two models, [steps]: all its points but the start.

    Args:
        model_start, model_end: modules, or wrappers; they are left alone.
        metric: of the wrapped model.
        steps: how many points.
        deepcopy_model: for the signature; nothing is changed in any case.
        fixed: makes no difference to this function.
    """
    del deepcopy_model, fixed
    start, steps = wrapped(model_start), contract.checked_steps(steps)
    direction = _difference(start, wrapped(model_end))
    t = contract.line_offsets(steps) / steps
    return np.array(values_at(start, metric, [direction], t[:, None]))


def random_line(
    model_start: Any,
    metric: Metric,
    distance: float = 0.1,
    steps: int = 100,
    normalization: str | None = "filter",
    deepcopy_model: bool = False,
    *,
    fixed: bool = False,
) -> np.ndarray:
    """Return a metric along a random direction, [steps], from the step after the start on.

    Args:
        model_start: a module, or a wrapper; it is left alone.
        metric: of the wrapped model.
        distance: the direction's length is ‖θ‖ / distance; with `fixed`, ‖θ‖ · distance.
        steps: how many points.
        normalization: of the direction: "filter", "layer", "model" or None.
        deepcopy_model: for the signature; nothing is changed in any case.
        fixed: draw Gaussian directions, and multiply by the distance.
    """
    del deepcopy_model
    start, steps = wrapped(model_start), contract.checked_steps(steps)
    weights = _weights(start)
    direction = contract.normalized(contract.drawn(weights, fixed), weights, normalization)
    direction = contract.scaled(direction, weights, distance, fixed)
    t = contract.line_offsets(steps) / steps
    return np.array(values_at(start, metric, [direction], t[:, None]))


def planar_interpolation(
    model_start: Any,
    model_end_one: Any,
    model_end_two: Any,
    metric: Metric,
    steps: int = 20,
    deepcopy_model: bool = False,
    *,
    fixed: bool = False,
) -> np.ndarray:
    """Return a metric over the plane through three models, [steps, steps].

    Args:
        model_start, model_end_one, model_end_two: modules, or wrappers; they are left alone.
        metric: of the wrapped model.
        steps: how many points along each direction; the ends themselves are not among them.
        deepcopy_model: for the signature; nothing is changed in any case.
        fixed: align the rows.
    """
    del deepcopy_model
    start, steps = wrapped(model_start), contract.checked_steps(steps)
    directions = [_difference(start, wrapped(end)) for end in (model_end_one, model_end_two)]
    return _plane(start, metric, directions, (steps, 0.0, float(steps)), fixed)


def random_plane(
    model: Any,
    metric: Metric,
    distance: float = 1,
    steps: int = 20,
    normalization: str | None = "filter",
    deepcopy_model: bool = False,
    *,
    fixed: bool = False,
) -> np.ndarray:
    """Return a metric over the plane of two random directions around a model, [steps, steps].

    Args:
        model: a module, or a wrapper; it is left alone.
        metric: of the wrapped model.
        distance: the plane is ‖θ‖ / distance wide; with `fixed`, ‖θ‖ · distance.
        steps: how many points along each direction.
        normalization: of the directions: "filter", "layer", "model" or None.
        deepcopy_model: for the signature; nothing is changed in any case.
        fixed: align the rows, draw Gaussian directions, and multiply by the distance.
    """
    del deepcopy_model
    start, steps = wrapped(model), contract.checked_steps(steps)
    weights = _weights(start)
    first = contract.drawn(weights, fixed)
    drawn = [first, contract.orthogonal_to(first, fixed)]
    directions = []
    for each in drawn:
        scaled = contract.scaled(
            contract.normalized(each, weights, normalization), weights, distance, fixed
        )
        # half of it, so that coordinates stay within [-1, 1]
        directions.append([tensor / 2 for tensor in scaled])
    return _plane(start, metric, directions, (steps, steps / 2, steps / 2), fixed)


def _plane(
    start: Any,
    metric: Metric,
    directions: Sequence[Sequence[Tensor]],
    scale: tuple[int, float, float],
    fixed: bool,
) -> np.ndarray:
    """Return a metric over a plane.

    Args:
        scale: steps along each axis, steps before the start, and steps in a direction's length.
    """
    steps, before, per_length = scale
    walk = list(contract.plane_walk(steps, fixed))
    t = (np.array([[x, y] for _, _, x, y in walk]) - before) / per_length
    data: list[list[Any]] = [[None] * steps for _ in range(steps)]
    for (i, j, _, _), value in zip(walk, values_at(start, metric, directions, t)):
        data[i][j] = value
    return np.array(data)


def _weights(wrapper: Any) -> list[Tensor]:
    """The weights that move, in the order of the wrapper's modules, on the CPU."""
    found = [p.detach().cpu() for p in parameters_of(wrapper.modules)]
    if not found:
        raise ModeconnError("the model has no parameters: expected some that can move")
    return found


def _difference(start: Any, end: Any) -> list[Tensor]:
    mine, its = _weights(start), _weights(end)
    if [p.shape for p in mine] != [p.shape for p in its]:
        raise ModeconnError(
            f"the models have {len(mine)} and {len(its)} parameters, or of other shapes: expected "
            "models of one architecture"
        )
    return [b - a for a, b in zip(mine, its)]
