"""Landscaper's `compute_loss_landscape` (PyPI landscaper 1.3.1), the forwards from planned passes.

One line of a script changes: `from modeconn.dropin.landscaper import compute_loss_landscape`. Its
values and coordinates go into `landscaper.LossLandscape`, and the files of `save_landscape` into
`LossLandscape.load_from_npz`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.data.batches import as_batches
from modeconn.data.inputs import moved
from modeconn.dropin.goldstein_directions import entries, state_of
from modeconn.errors import ModeconnError, warn
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.progress import Progress
from modeconn.evaluation.replay.mapping import map as at_each_point
from modeconn.files.writing import atomic_write
from modeconn.metrics import Head, PerSample
from modeconn.parameters.state import load
from modeconn.parameters.subspace import Subspace
from modeconn.parameters.wrappers import unwrapped

__all__ = ["MeanLoss", "compute_loss_landscape", "save_landscape"]

# What keeps a direction of zeros from a division by zero.
_TINY = 1e-10
# Rows of a batch of `MeanLoss` where it is called as any function is.
_BATCH_SIZE = 1024


class MeanLoss:
    """A mean loss over data, as a `scalar_fn` that is known: it takes the evaluator's one pass.

    Args:
        loss: as `modeconn.evaluate` takes it: "cross_entropy", `nn.MSELoss()`, …
    """

    def __init__(self, loss: str | PerSample = "cross_entropy") -> None:
        self.loss = loss
        self._head = Head(loss, ["loss"])

    def __call__(self, model: nn.Module, data: Any) -> float:
        """Return the mean loss of a model over data, computed batch by batch."""
        like = next(iter(model.parameters()))
        total = count = 0.0
        for inputs, targets in as_batches(data, _BATCH_SIZE):
            x = moved(inputs, like.dtype, like.device)
            with torch.no_grad():
                outputs = (
                    model(**x)
                    if isinstance(x, dict)
                    else model(*(x if isinstance(x, tuple) else (x,)))
                )
            labels = self._head.counted(inputs, targets).to(like.device)
            labels = self._head.fit(outputs, labels)
            total += float(self._head.sums(outputs, labels)[0])
            count += float(self._head.counts(labels)[0])
        return total / count


def compute_loss_landscape(
    model: nn.Module,
    data: Any,
    dirs: Sequence[Sequence[Any]],
    scalar_fn: Callable[[Any, Any], float],
    steps: int = 41,
    distance: float = 0.01,
    dim: int = 3,
    device: Any = "cuda",
    use_complex: bool = False,
    *,
    progress: bool | Progress | None = None,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Compute a function of a model on a grid around it, along directions.

    Each tensor of a direction is scaled to the root of its size, then the whole direction so that
    steps / 2 of it are `distance` times the norm of the parameters. Index i of an axis is i -
    steps // 2 times its direction. The model is left as it was.

    Args:
        model: the network at the middle; in the mode that `scalar_fn` is to see.
        data: what `scalar_fn` is given.
        dirs: directions, each a tensor for each parameter, in order.
        scalar_fn: (model, data) → a number. A `MeanLoss` of a model in eval mode takes one pass for
            all points; any other function is called at each point, and its forwards are answered
            from planned passes where they are the same at every point (`modeconn.map`).
        steps: points on each axis.
        distance: the range of the axes, as a share of the norm of the parameters.
        dim: axes, of which there are at most as many as directions.
        device: not used: the model's own.
        use_complex: whether directions are complex: the parameters move by their real part.
        progress: True for a bar, False for none, None for a bar on a terminal.

    Returns:
        The values, float64 [steps] * dim, and the coordinates of each axis. NaN is replaced by the
        mean of the finite values, and infinities by the largest and smallest, with a warning.

    Raises:
        ModeconnError: bad input; no value is finite.
    """
    net = unwrapped(model)
    for name, value in (("steps", steps), ("dim", dim)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModeconnError(f"{name} is {value!r}: expected a whole number, at least 1")
    if dim > len(dirs):
        raise ModeconnError(
            f"dim is {dim}, and there are {len(dirs)} directions: expected at least dim"
        )
    named = [*entries(net, "weights")]
    scaled = [_scaled(net, dirs[i], steps, distance, use_complex) for i in range(dim)]
    origin = load(net)
    path = Subspace(origin, [state_of(net, named, each, "weights") for each in scaled])
    offsets = np.arange(steps) - steps // 2
    t = np.array([*itertools.product(offsets, repeat=dim)], np.float64)
    t = t[:, 0] if dim == 1 else t
    if isinstance(scalar_fn, MeanLoss) and not model.training:
        options: dict[str, Any] = {"loss": scalar_fn.loss, "metrics": ["loss"], "buffers": "start"}
        alone = {"distributed": False, **options}
        values = evaluate(net, path, data, t, progress=progress, **alone).loss
    else:
        values = _called(net, path, t, scalar_fn, data, progress)
    loss = _replaced(values).reshape([steps] * dim)
    return loss, [np.linspace(-distance, distance, steps) for _ in range(dim)]


def save_landscape(
    file: str | os.PathLike[str], loss: np.ndarray, coordinates: Sequence[np.ndarray]
) -> None:
    """Write a landscape as an npz file that landscaper's `LossLandscape.load_from_npz` reads.

    Args:
        file: the file, with the suffix .npz.
        loss: the values, [steps] * dim.
        coordinates: of each axis; landscaper wants two or more.

    Raises:
        ModeconnError: another suffix, or coordinates that do not fit the values.
    """
    if not str(file).endswith(".npz"):
        raise ModeconnError(f"{file}: the name must end in .npz")
    if [len(axis) for axis in coordinates] != [*np.shape(loss)]:
        raise ModeconnError(
            f"coordinates have {[len(axis) for axis in coordinates]} values: expected "
            f"{[*np.shape(loss)]}, the shape of loss"
        )
    atomic_write(
        file,
        lambda stream: np.savez(stream, loss=loss, coordinates=np.stack([*coordinates])),
    )


def _scaled(
    net: nn.Module, direction: Sequence[Any], steps: int, distance: float, use_complex: bool
) -> list[Tensor]:
    """Scale a direction to the parameters, tensor by tensor and as a whole."""
    weights = [value.detach() for _, value in entries(net, "weights")]
    if len(direction) != len(weights):
        raise ModeconnError(
            f"a direction has {len(direction)} tensors: expected {len(weights)}, one for each "
            f"parameter of {type(net).__name__}"
        )
    tensors = [torch.as_tensor(d).detach().to(w.device) for d, w in zip(direction, weights)]
    if any(d.is_complex() for d in tensors) and not use_complex:
        raise ModeconnError("a direction is complex: expected real tensors, or use_complex=True")
    alike = [d * (w.numel() ** 0.5 / (d.norm() + _TINY)) for d, w in zip(tensors, weights)]
    length = _root_of_squares(alike)
    if not bool(length.abs() > 0):
        raise ModeconnError("a direction is zero: expected one that leads somewhere")
    factor = _root_of_squares(weights) * distance / (steps / 2) / length
    return [(d * factor).real if d.is_complex() else d * factor for d in alike]


def _root_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The root of the sum of squares, which of complex tensors is complex, as landscaper's."""
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()


def _called(
    net: nn.Module,
    path: Subspace,
    t: np.ndarray,
    scalar_fn: Callable[[Any, Any], float],
    data: Any,
    progress: bool | Progress | None,
) -> np.ndarray:
    def value(model: nn.Module) -> float:
        with torch.no_grad():
            return float(scalar_fn(model, data))

    result = at_each_point(value, net, path, t, buffers="start", progress=progress)
    return np.array(result.values, np.float64)


def _replaced(values: np.ndarray) -> np.ndarray:
    """Replace what is not finite, as landscaper does, whose topology needs numbers."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ModeconnError("scalar_fn is finite at none of the points: expected some that are")
    if finite.size < values.size:
        warn(
            f"scalar_fn is not finite at {values.size - finite.size:,} of {values.size:,} points: "
            "NaN is replaced by the mean of the others, infinities by the largest and smallest",
            RuntimeWarning,
        )
    high, low = float(finite.max()), float(finite.min())
    replaced: np.ndarray = np.nan_to_num(values, nan=finite.mean(), posinf=high, neginf=low)
    return replaced
