"""A fit from its checked arguments to its result: what curves, lines and simplices share."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.data.inputs import Inputs
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.progress import Progress, reporting
from modeconn.evaluation.result import PathResult
from modeconn.files.writing import locked
from modeconn.metrics import PerSample
from modeconn.parameters.path_files import NETWORK, digest_of_architecture, made_of
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points
from modeconn.resuming import Record
from modeconn.training.checkpoint import training_file
from modeconn.training.curves.aligning import digest_of_alignment
from modeconn.training.curves.loop import Draw, FitLoop, Seen
from modeconn.training.curves.preparing import Start, optimizers_of, start_of, steps_of
from modeconn.training.curves.result import Fit
from modeconn.training.curves.settings import FitSettings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The arguments that every fit has, under their names in `fit_curve`, which describes them."""

    steps: int | None
    epochs: int | None
    loss: str | PerSample
    lr: float
    batch_size: int
    t: str
    augment: Callable[[Inputs], Inputs] | None
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None
    weight_decay: float
    seed: int
    test: Any
    points: Points
    checkpoint: str | os.PathLike[str] | None
    resume: bool
    metadata: Mapping[str, str] | None
    progress: bool | Progress | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Recipe:
        """Take what is a fit's from all arguments of a function, its `locals()`; none may lack."""
        return cls(**{entry.name: arguments[entry.name] for entry in fields(cls)})

    def settings(self, kind: str, bends: int, samples: int, weight: float = 0.0) -> FitSettings:
        """Return the settings of a fit, checked.

        Args:
            kind: of path.
            bends: control points between the ends.
            samples: of the data.
            weight: of what is added to the loss.
        """
        made = FitSettings(
            kind=kind,
            bends=bends,
            steps=1,
            lr=self.lr,
            batch_size=self.batch_size,
            t=self.t,
            weight_decay=self.weight_decay,
            seed=self.seed,
            samples=samples,
            regulariser=weight,
        )
        made.check()
        return replace(made, steps=steps_of(self.steps, self.epochs, samples, self.batch_size))


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Holds what a fit trains.

    Attributes:
        model: the architecture.
        path: through the control points to begin with.
        samples: all inputs and targets.
        free: the control points that are trained.
        draw: coefficients and t of a step.
        seen: called with t and loss of a step.
        extra: of the points [K, P], added to the loss.
        moving: arrays that change with the steps.
        alignment: by which the last control point was permuted.
    """

    model: nn.Module
    path: Path
    samples: tuple[Inputs, Tensor]
    free: slice
    draw: Draw
    seen: Seen
    extra: Callable[[Tensor], Tensor] | None = None
    moving: dict[str, np.ndarray] = field(default_factory=dict)
    alignment: Any = None


def fitted(problem: Problem, recipe: Recipe, settings: FitSettings) -> Fit:
    """Take the steps of a fit, evaluate what comes out, and write it where that is asked for."""
    checkpoint, model = recipe.checkpoint, problem.model
    file = None if checkpoint is None else training_file(checkpoint)
    with locked(file), torch.enable_grad():
        callables = [recipe.augment, recipe.optimizer]
        start = start_of(
            model, problem.path, problem.samples, recipe.loss, settings, callables, file is not None
        )
        loop = _loop(problem, recipe, replace(settings, digests=start.digests), start, file)
        loop.begin(recipe.resume)
        began = time.perf_counter()
        try:
            with reporting(recipe.progress, "steps", "fit") as report:
                loop.run(report)
            seconds = time.perf_counter() - began
            path = _path_of(problem.path, loop, start)
            results = _measured(model, path, problem.samples, recipe, start.norms)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(loop.interrupted()) from None
        stopped = f"{settings.steps:,} steps done"
        about = _about(problem, settings, recipe)
        fit = Fit(path, problem.alignment, loop.history, *results, stopped, seconds, about)
        if checkpoint is not None:
            fit.save(checkpoint)
        loop.record.remove()
    return fit


def _loop(
    problem: Problem,
    recipe: Recipe,
    settings: FitSettings,
    start: Start,
    file: os.PathLike[str] | None,
) -> FitLoop:
    return FitLoop(
        working=start.working,
        points=start.points,
        free=problem.free,
        objective=start.objective,
        samples=start.samples,
        settings=settings,
        draw=problem.draw,
        seen=problem.seen,
        record=Record(file, "unfinished fit", settings.described()),
        optimizers=optimizers_of(recipe.optimizer, recipe.lr),
        extra=problem.extra,
        augment=recipe.augment,
        moving=problem.moving,
    )


def _path_of(begun: Path, loop: FitLoop, start: Start) -> Path:
    """Return the path of the trained points; those that are not trained are as they were given."""
    trained = start.working.states(loop.trained.detach(), start.states[loop.free])
    points = list(start.states)
    points[loop.free] = trained
    made: Path = made_of(type(begun), points)
    made.names, made.prefixes = begun.names, begun.prefixes
    return made


def _measured(
    model: nn.Module, path: Path, samples: tuple[Inputs, Tensor], recipe: Recipe, norms: bool
) -> tuple[PathResult, PathResult | None]:
    """Evaluate a path on the training data, and on test data if there are any."""
    measured = functools.partial(
        evaluate,
        model,
        path,
        points=recipe.points,
        loss=recipe.loss,
        buffers="recompute" if norms else "interpolate",
        recompute_data=samples if norms else None,
        progress=recipe.progress if isinstance(recipe.progress, bool) else False,
        distributed=False,
    )
    # apart: each has maxima of its own to search for
    return measured(samples), None if recipe.test is None else measured(recipe.test)


def _about(problem: Problem, settings: FitSettings, recipe: Recipe) -> dict[str, str]:
    """Return the text that the file of a path gets."""
    made = {name: str(value) for name, value in settings.described().items()}
    for name in settings.digests or {}:
        made.pop(name, None)
    return {
        **made,
        "model": type(problem.model).__name__,
        NETWORK: digest_of_architecture(problem.model),
        "alignment": digest_of_alignment(problem.alignment),
        **(recipe.metadata or {}),
    }
