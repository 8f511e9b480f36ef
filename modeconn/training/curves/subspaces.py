"""Lines and simplices of networks, trained as a whole: every network in them is to be good."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.data.inputs import Inputs
from modeconn.errors import ModeconnError
from modeconn.evaluation.progress import Progress
from modeconn.metrics import PerSample
from modeconn.parameters.paths import Line, Mixture
from modeconn.parameters.points import Points, is_count
from modeconn.parameters.state import State
from modeconn.training.curves.drawing import Drawing
from modeconn.training.curves.preparing import in_memory
from modeconn.training.curves.result import Fit
from modeconn.training.curves.running import Problem, Recipe, fitted

# A new vertex begins this far from the mean of the others, as a share of that mean's norm: a
# simplex without a volume has no gradient of its logarithm.
_APART = 0.01


@without_autocast
def fit_line(
    model: nn.Module,
    a: Any,
    b: Any,
    data: Any,
    *,
    beta: float = 1.0,
    steps: int | None = None,
    epochs: int | None = None,
    loss: str | PerSample = "cross_entropy",
    lr: float = 1e-3,
    batch_size: int = 128,
    t: str = "uniform",
    augment: Callable[[Inputs], Inputs] | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    test: Any = None,
    points: Points = "adaptive",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: bool | Progress | None = None,
) -> Fit:
    """Train a line of networks, both ends with it (Wortsman et al. 2021, section 3).

    The square of the ends' cosine, times beta, is added to the loss, so that they stay apart.

    Args:
        model: the architecture; it is left as it was.
        a, b: the ends to begin with: untrained networks, or trained ones.
        data: as for `fit_curve`.
        beta: weight of the squared cosine.
        steps, epochs, loss, lr, batch_size, augment, weight_decay, seed, test, checkpoint, resume,
            metadata, progress: as for `fit_curve`.
        t: how that of a step is drawn, "uniform" or "importance".
        optimizer: as for `fit_curve`, of the ends [2, parameters].
        points: of the evaluations.

    Returns:
        The line between the trained ends, and loss and error along it.

    Raises:
        ModeconnError: as for `fit_curve`.
    """
    recipe = Recipe.of(locals())
    _check_weight("beta", beta)
    samples, path, drawing = in_memory(data), Line(a, b), Drawing(t, seed)
    problem = Problem(
        model=model,
        path=path,
        samples=samples,
        free=slice(0, 2),
        draw=functools.partial(drawing.on, path),
        seen=drawing.add,
        extra=functools.partial(_cosine, beta) if beta else None,
        moving={"means": drawing.means},
    )
    return fitted(problem, recipe, recipe.settings("line", 0, len(samples[1]), beta))


@without_autocast
def fit_simplex(
    model: nn.Module,
    vertices: Sequence[Any],
    data: Any,
    *,
    volume: float = 1e-4,
    steps: int | None = None,
    epochs: int | None = None,
    loss: str | PerSample = "cross_entropy",
    lr: float = 1e-3,
    batch_size: int = 128,
    augment: Callable[[Inputs], Inputs] | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    weight_decay: float = 0.0,
    seed: int = 0,
    test: Any = None,
    points: Points = 32,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: bool | Progress | None = None,
) -> Fit:
    """Add one vertex to a simplex of networks (Benton et al. 2021, section 4).

    The new vertex is trained so that all networks of the simplex are good, at points that are drawn
    uniformly from it, and that its volume is large: `volume` times the logarithm of the volume is
    subtracted from the loss. For a simplex of more vertices, call it again with
    `fit.path.control_points`.

    Args:
        model: the architecture; it is left as it was.
        vertices: one trained network or more, which stay as they are.
        data: as for `fit_curve`.
        volume: weight of the logarithm of the volume.
        steps, epochs, loss, lr, batch_size, augment, weight_decay, seed, test, checkpoint, resume,
            metadata, progress: as for `fit_curve`.
        optimizer: as for `fit_curve`, of the new vertex [1, parameters].
        points: of the evaluations: a count of random points, beside the vertices and the centre; or
            coefficients.

    Returns:
        The simplex as a `Mixture`, whose last control point is the new vertex.

    Raises:
        ModeconnError: as for `fit_curve`.
    """
    _check_weight("volume", volume)
    path = _with_vertex(vertices, seed)
    if is_count(points):
        points = _points_within(path.dim, points, seed)
    recipe = Recipe.of(locals() | {"t": "uniform"})
    samples = in_memory(data)
    problem = Problem(
        model=model,
        path=path,
        samples=samples,
        free=slice(path.dim - 1, path.dim),
        draw=functools.partial(_drawn, path.dim, seed),
        seen=lambda t, loss: None,
        extra=functools.partial(_log_volume, -volume) if volume else None,
    )
    return fitted(problem, recipe, recipe.settings("simplex", path.dim, len(samples[1]), volume))


def _check_weight(name: str, value: float) -> None:
    if isinstance(value, bool) or not 0 <= value < math.inf:
        raise ModeconnError(f"{name} is {value!r}: expected a number, at least 0")


def _cosine(weight: float, points: Tensor) -> Tensor:
    """Return the squared cosine of two points, times a weight."""
    a, b = points
    found: Tensor = weight * (a @ b) ** 2 / ((a @ a) * (b @ b))
    return found


def _log_volume(weight: float, points: Tensor) -> Tensor:
    """Return the logarithm of a simplex's volume, times a weight, up to a constant.

    The volume is the root of the determinant of the edges' products, over (K - 1)!.
    """
    edges = (points[1:] - points[0]).double()
    found: Tensor = weight * torch.linalg.slogdet(edges @ edges.t())[1] / 2
    return found.to(points.dtype)


def _with_vertex(vertices: Sequence[Any], seed: int) -> Mixture:
    """Return the simplex with one vertex more, near the mean of the others."""
    given = Mixture(vertices)
    count = given.dim
    mean = given.at([[1 / count] * count])
    generator = torch.Generator().manual_seed(seed)
    vertex: State = {}
    for name, value in mean.items():
        if not value.is_floating_point() or name in given.fixed:
            vertex[name] = value
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
        scale = _APART * value.norm() / max(value.numel(), 1) ** 0.5
        vertex[name] = (
            value if name.endswith(("running_mean", "running_var")) else (value + noise * scale)
        )
    made = Mixture([*given.control_points, vertex])
    made.names = [*given.names, "the new vertex"]
    return made


def _drawn(count: int, seed: int, step: int) -> tuple[Tensor, list[float]]:
    coefficients = np.random.default_rng([seed, step]).dirichlet(np.ones(count))
    return torch.from_numpy(coefficients), coefficients.tolist()


def _points_within(count: int, points: int, seed: int) -> np.ndarray:
    """Return the vertices, the centre and some random points, [T, K]."""
    centre = np.full((1, count), 1 / count)
    drawn = np.random.default_rng(seed).dirichlet(np.ones(count), size=points)
    return np.concatenate([np.eye(count), centre, drawn])
