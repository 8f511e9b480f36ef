"""Curves of low loss between two networks, trained as in Garipov et al. 2018."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.data.inputs import Inputs
from modeconn.errors import ModeconnError
from modeconn.evaluation.progress import Progress
from modeconn.metrics import PerSample
from modeconn.parameters.paths import Bezier, Line, Path, PolyChain
from modeconn.parameters.points import Points
from modeconn.training.curves.aligning import aligned
from modeconn.training.curves.drawing import Drawing
from modeconn.training.curves.preparing import in_memory
from modeconn.training.curves.result import Fit
from modeconn.training.curves.running import Problem, Recipe, fitted
from modeconn.training.curves.settings import KINDS

_PATHS: dict[str, type[Bezier | PolyChain]] = dict(zip(KINDS, (Bezier, PolyChain)))


@without_autocast
def fit_curve(
    model: nn.Module,
    a: Any,
    b: Any,
    data: Any,
    *,
    kind: str = "bezier",
    bends: int = 1,
    align: Any = True,
    steps: int | None = None,
    epochs: int | None = None,
    loss: str | PerSample = "cross_entropy",
    lr: float = 1e-3,
    batch_size: int = 128,
    t: str = "importance",
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
    """Train a curve of low loss between two networks (Garipov et al. 2018, section 3).

    Each step draws one t and one batch, and takes the gradient of the loss at the network there by
    the bends of the curve. The learning rate is constant for half of the steps, then falls to a
    hundredth. Norms normalize by the batch, as in training. Interrupted and resumed, a fit ends at
    bitwise the same curve as one that ran through (same machine, versions, number of threads).

    Args:
        model: the architecture, on the device and in the memory format of the computation; it is
            left as it was.
        a, b: modules, state dicts or files: the ends, which stay as they are.
        data: training data as `evaluate` takes them; they are held in memory.
        kind: "bezier", or "polychain" for straight segments.
        bends: control points between the ends.
        align: True to permute b's units by `align` on the data first, an `Alignment` that is made
            already, or False. The curve then ends at the permuted b, which is the same function.
        steps: how many steps; or
        epochs: how many times over the data, whose incomplete batches are left out.
        loss: as for `evaluate`.
        lr: the learning rate of Adam.
        batch_size: samples of a step.
        t: "importance" draws it where the moving mean of the loss is high, "uniform" everywhere.
        augment: (inputs of a batch) → inputs; it may draw from PyTorch's global generator.
        optimizer: a callable that makes another optimizer of a list with one tensor, the bends
            [bends, parameters]; its learning rates follow the same schedule.
        weight_decay: half of it times the squared norm of the network at t is added to the loss.
        seed: of t, batches, dropout and augmentation.
        test: other data to evaluate the curve on.
        points: of these evaluations, as for `evaluate`: 101 for a dense one.
        checkpoint: a safetensors file for the curve, which `load_path` reads. Until it is finished,
            `<checkpoint>.training` keeps the fit.
        resume: continue from `<checkpoint>.training`; settings and data must be the same.
        metadata: text added to the checkpoint's metadata.
        progress: as for `evaluate`; of the steps.

    Returns:
        The curve, its ends bitwise the given networks (b permuted, with an alignment), and loss and
        error along it.

    Raises:
        ModeconnError: bad input; a fit that is kept is missing, in the way or another. `Diverged`
            where a loss is not finite, with the step and its t.
        KeyboardInterrupt: with a message that says what was saved.
    """
    recipe = Recipe.of(locals())
    _check_kind(kind, bends)
    samples = in_memory(data)
    settings = recipe.settings(kind, bends, len(samples[1]))
    line, alignment = aligned(model, Line(a, b), samples, align, seed)
    path, drawing = _bent(line, _PATHS[kind], bends), Drawing(t, seed)
    problem = Problem(
        model=model,
        path=path,
        samples=samples,
        free=slice(1, -1),
        draw=functools.partial(drawing.on, path),
        seen=drawing.add,
        moving={"means": drawing.means},
        alignment=alignment,
    )
    return fitted(problem, recipe, settings)


def _check_kind(kind: str, bends: int) -> None:
    if kind not in KINDS:
        expected = " or ".join(f'"{name}"' for name in KINDS)
        raise ModeconnError(f"kind is {kind!r}: expected {expected}")
    if isinstance(bends, bool) or not isinstance(bends, int) or bends < 1:
        raise ModeconnError(f"bends is {bends!r}: expected a whole number, at least 1")


def _bent(line: Path, kind: type[Path], bends: int) -> Path:
    """Return a curve with evenly spaced bends on the straight line."""
    inner = [line.at((k + 1) / (bends + 1)) for k in range(bends)]
    names = [line.names[0], *(f"bend {k + 1}" for k in range(bends)), line.names[1]]
    path = kind([line.control_points[0], *inner, line.control_points[1]])
    path.names, path.prefixes, path.modules = names, line.prefixes, [None] * len(names)
    path.modules[0], path.modules[-1] = line.modules
    return path
