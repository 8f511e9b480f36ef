"""Curves as github.com/timgaripov/dnn-mode-connectivity trains them (Garipov et al. 2018).

`load_curve` reads its checkpoints; `eval_curve` and `plane` compute what its scripts of these names
do, and write the same npz files. The data is read once for the statistics of batch norms at all
points, and once for the losses, where the scripts take three passes for each point.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.errors import ModeconnError, listed
from modeconn.evaluation.evaluator import evaluate
from modeconn.files.writing import atomic_write
from modeconn.parameters.length import Lengths
from modeconn.parameters.paths import Bezier, Path, PolyChain
from modeconn.parameters.planes import Plane
from modeconn.parameters.state import State, load
from modeconn.parameters.wrappers import unwrapped

__all__ = ["eval_curve", "load_curve", "plane"]

CURVES: dict[str, type[Bezier | PolyChain]] = {"Bezier": Bezier, "PolyChain": PolyChain}
_NET, _LAYER = "net.", "coeff_layer."
_COPY = re.compile(r"(?P<stem>.+)_(?P<index>\d+)")
# Data sets, and how their names begin in the files.
_SETS = {"train": "tr", "test": "te"}
# Rows of a batch where the data do not say: the scripts' default.
_BATCH_SIZE = 128


def load_curve(checkpoint: Any, model: nn.Module, curve: str | None = None) -> Bezier | PolyChain:
    """Return the curve that a CurveNet's checkpoint holds, as a path of the base model.

    Its `net.<module>.<weight|bias>_<k>` are the control points' parameters, and match the base
    model's by name, or else in order. Buffers are those of the checkpoint, at all control points.

    Args:
        checkpoint: the file, with the state under "model_state"; its content; or the CurveNet.
        model: the base model, whose weights do not matter.
        curve: "Bezier" or "PolyChain"; by default what the checkpoint's `coeff_layer` is.

    Raises:
        ModeconnError: the checkpoint is no CurveNet's, or does not fit the model.
    """
    state = load(checkpoint)
    kind = _kind(state, curve)
    tensors = {
        name.removeprefix(_NET): tensor
        for name, tensor in state.items()
        if not name.startswith(_LAYER)
    }
    bends = _bends(state, tensors)
    parameters, buffers = _grouped(tensors, bends)
    base = unwrapped(model)
    names = _matched(parameters, dict(base.named_parameters()), "parameters")
    own = {name: tensor for name, tensor in load(base).items() if name in _buffer_names(base)}
    if not any(name.endswith("num_batches_tracked") for name in buffers):  # older checkpoints
        own = {name: own[name] for name in own if not name.endswith("num_batches_tracked")}
    kept = {name: copies[0] for name, copies in _matched(buffers, own, "buffers").items()}
    shared = load(base) | kept
    ties = _ties(base)
    points = []
    for k in range(bends):
        moved = {name: copies[k] for name, copies in names.items()}
        points.append(shared | {name: moved[first] for name, first in ties.items()})
    return CURVES[kind](points)


def eval_curve(
    model: nn.Module,
    path: Path,
    train: Any,
    test: Any,
    file: str | os.PathLike[str] | None = None,
    *,
    num_points: int = 61,
    wd: float = 1e-4,
    batch_size: int | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Compute what `eval_curve.py` does: losses and errors along a curve, and its length.

    Args:
        model: the base model; its own weights do not matter.
        path: the curve, of `load_curve` or any other path of one coordinate.
        train: the training data, as `modeconn.evaluate` takes it, not shuffled. Batch norms'
            statistics are recomputed from it, weighted by samples.
        test: the test data.
        file: the npz file to write, such as "curve.npz"; None to write none.
        num_points: how many points, evenly spaced.
        wd: weight decay; `*_loss` is `*_nll` and wd / 2 times the sum of squares of the parameters.
        batch_size: rows of a batch; by default those of a DataLoader, or 128.
        options: further arguments of `modeconn.evaluate`, such as `device` and `progress`.

    Returns:
        The arrays of the file: `ts`, `dl` (the distance from the point before), and for "tr" and
        "te" `_loss`, `_nll`, `_acc` and `_err` (percent), all [T]; of `_loss`, `_nll` and `_err`
        also `_min`, `_max`, `_avg`, and `_int`, the mean along the curve by its length.

    Raises:
        ModeconnError: bad input.
    """
    ts = np.linspace(0.0, 1.0, num_points)
    if path.dim != 1 or num_points < 2:
        raise ModeconnError(
            f"path has {path.dim} coordinates and num_points is {num_points}: expected a curve, "
            "and at least 2 points"
        )
    lengths = Lengths(path, dict(unwrapped(model).named_parameters()))
    measured = _measured(model, path, (train, test), ts, batch_size, options)
    dl = lengths.steps(ts)
    arrays = {"ts": ts, "dl": dl}
    for prefix, columns in measured.items():
        columns = {"loss": columns["nll"] + 0.5 * wd * lengths.squares(ts), **columns}
        for name, column in columns.items():
            arrays[f"{prefix}_{name}"] = column
            if name != "acc":
                arrays |= _statistics(f"{prefix}_{name}", column, dl)
    _write(file, arrays)
    return arrays


def plane(
    model: nn.Module,
    path: Path,
    train: Any,
    test: Any,
    file: str | os.PathLike[str] | None = None,
    *,
    grid_points: int = 21,
    margins: tuple[float, float, float, float] = (0.2, 0.2, 0.2, 0.2),
    curve_points: int = 61,
    wd: float = 1e-4,
    batch_size: int | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Compute what `plane.py` does: losses and errors on the plane of a curve's first three points.

    The x axis leads from control point 0 to 2, and the y axis is at a right angle to it, towards
    control point 1. Any three networks will do, as `PolyChain([a, c, b])`.

    Args:
        model: the base model; its own weights do not matter.
        path: the curve, with at least three control points.
        train: the training data, not shuffled, which statistics are recomputed from.
        test: the test data.
        file: the npz file to write, such as "plane.npz"; None to write none.
        grid_points: G, how many points on each axis.
        margins: left, right, bottom and top, as shares of the axes.
        curve_points: how many points of the curve are drawn.
        wd: weight decay; `*_loss` is `*_nll` and wd / 2 times the sum of the parameters' norms,
            tensor by tensor and not squared, as that script has it.
        batch_size: rows of a batch; by default those of a DataLoader, or 128.
        options: further arguments of `modeconn.evaluate`.

    Returns:
        The arrays of the file: `ts`, `bend_coordinates` [K, 2], `curve_coordinates` [T, 2],
        `alphas`, `betas`, `grid` [G, G, 2], and for "tr" and "te" `_loss`, `_nll`, `_acc` and
        `_err` (percent), [G, G].

    Raises:
        ModeconnError: fewer than three control points, or three on one line.
    """
    names = dict(unwrapped(model).named_parameters())
    spanned, places = _spanned(path, names)
    (dx, _), (_, dy) = places[2], places[1]
    left, right, bottom, top = margins
    alphas = np.linspace(0.0 - left, 1.0 + right, grid_points)
    betas = np.linspace(0.0 - bottom, 1.0 + top, grid_points)
    grid = np.stack(np.meshgrid(alphas * dx, betas * dy, indexing="ij"), axis=-1)
    t = grid.reshape(-1, 2)
    ts = np.linspace(0.0, 1.0, curve_points)
    arrays = {
        "ts": ts,
        "bend_coordinates": places,
        "curve_coordinates": path.coefficients(ts).numpy() @ places,
        "alphas": alphas,
        "betas": betas,
        "grid": grid,
    }
    decay = 0.5 * wd * Lengths(spanned, names).norms(t)
    measured = _measured(model, spanned, (train, test), t, batch_size, options)
    for prefix, columns in measured.items():
        for name, column in {"loss": columns["nll"] + decay, **columns}.items():
            arrays[f"{prefix}_{name}"] = column.reshape(grid_points, grid_points)
    _write(file, arrays)
    return arrays


def _measured(
    model: nn.Module,
    path: Path,
    data: tuple[Any, Any],
    t: np.ndarray,
    batch_size: int | None,
    options: Mapping[str, Any],
) -> dict[str, dict[str, np.ndarray]]:
    """Return nll, accuracy and error of both data sets, by the beginning of their names."""
    given: dict[str, Any] = {
        "buffers": "recompute",
        "recompute_data": "train",
        "recompute_average": "samples",
        "batch_size": batch_size or getattr(data[0], "batch_size", None) or _BATCH_SIZE,
        "metrics": ("loss", "error"),
        "distributed": False,
    }
    results = evaluate(model, path, dict(zip(_SETS, data)), t, **(given | dict(options)))
    columns = {}
    for name, prefix in _SETS.items():
        error = 100.0 * results[name].error
        columns[prefix] = {"nll": results[name].loss, "acc": 100.0 - error, "err": error}
    return columns


def _statistics(name: str, values: np.ndarray, dl: np.ndarray) -> dict[str, np.ndarray]:
    """The least, greatest and mean value, and the mean along the curve, by the trapezoid rule."""
    middles = 0.5 * (values[:-1] + values[1:])
    found = {
        "min": values.min(),
        "max": values.max(),
        "avg": values.mean(),
        "int": (middles * dl[1:]).sum() / dl[1:].sum(),
    }
    return {f"{name}_{key}": np.asarray(value) for key, value in found.items()}


def _spanned(path: Path, names: Mapping[str, Any]) -> tuple[Plane, np.ndarray]:
    """Return the plane of the first three control points, and all control points' places on it."""
    if len(path.control_points) < 3:
        raise ModeconnError(
            f"path has {len(path.control_points)} control points: expected at least 3"
        )
    products = Lengths(path, names).products()[1:, 1:]
    to_1, to_2 = np.eye(len(products))[:2]
    x = to_2 / np.sqrt(to_2 @ products @ to_2)
    v = to_1 - (to_1 @ products @ x) * x
    square = v @ products @ v
    if not square > 1e-12 * products[0, 0]:
        raise ModeconnError("control points 0, 1 and 2 lie on one line: expected three on a plane")
    y = v / np.sqrt(square)
    places = np.concatenate([np.zeros((1, 2)), products @ np.stack([x, y], axis=1)])
    origin = path.control_points[0]
    u, v = (_direction(path, names, row) for row in (x, y))
    spanned = Plane(origin, u, v)
    return spanned, places


def _direction(path: Path, names: Mapping[str, Any], row: np.ndarray) -> State:
    """Return Σ_k row[k] (p_{k+1} - p_0) of the parameters."""
    first, *others = path.control_points
    direction = {}
    for name in first:
        if name in names:
            total = torch.zeros_like(first[name], dtype=torch.float64)
            for weight, other in zip(row.tolist(), others):
                total += weight * (other[name].double() - first[name].double())
            direction[name] = total.to(first[name].dtype)
    return direction


def _write(file: str | os.PathLike[str] | None, arrays: Mapping[str, np.ndarray]) -> None:
    if file is not None:
        atomic_write(file, lambda stream: np.savez(stream, **arrays))  # type: ignore[arg-type]  # ** also fills flags


# -- checkpoints -----------------------------------------------------------------------------------


def _kind(state: State, curve: str | None) -> str:
    """Return the kind of curve that a checkpoint holds."""
    if curve is None:
        if not any(name.startswith(_LAYER) for name in state):
            raise ModeconnError(
                f"the checkpoint has no {_LAYER}*: it is no CurveNet's, or curve is missing: "
                f"expected {' or '.join(CURVES)}"
            )
        return "Bezier" if f"{_LAYER}binom" in state else "PolyChain"
    if curve not in CURVES:
        raise ModeconnError(f"curve is {curve!r}: expected {' or '.join(CURVES)}")
    return curve


def _bends(state: State, tensors: State) -> int:
    """Return the number of control points."""
    if f"{_LAYER}range" in state:
        return state[f"{_LAYER}range"].numel()
    found = [_COPY.fullmatch(name) for name in tensors]
    counts = [int(match["index"]) + 1 for match in found if match]
    if not counts:
        raise ModeconnError(
            f"the checkpoint has no names such as {_NET}fc.weight_0: expected those of a CurveNet; "
            f"it has {listed([repr(name) for name in tensors])}"
        )
    return max(counts)


def _grouped(tensors: State, bends: int) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """Return the copies of each parameter, and the buffers, by their names without a number."""
    parameters: dict[str, list[Tensor]] = {}
    buffers: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        match = _COPY.fullmatch(name)
        if match is None:
            buffers[name] = [tensor]
            continue
        copies = [f"{match['stem']}_{k}" for k in range(bends)]
        missing = [repr(_NET + copy) for copy in copies if copy not in tensors]
        if missing or int(match["index"]) >= bends:
            lacks = f"lacks {listed(missing)}" if missing else f"has {name!r}"
            raise ModeconnError(
                f"the checkpoint {lacks}: expected {bends} copies of each parameter, _0 to "
                f"_{bends - 1}"
            )
        parameters[match["stem"]] = [tensors[copy] for copy in copies]
    return parameters, buffers


def _matched(
    found: Mapping[str, Sequence[Tensor]], own: Mapping[str, Tensor], kind: str
) -> dict[str, Sequence[Tensor]]:
    """Return the checkpoint's tensors by the model's names: equal names, or else equal places."""
    pairs = [(name, name) for name in own] if found.keys() == own.keys() else [*zip(own, found)]
    wrong = [
        f"{mine!r} is {[*own[mine].shape]}, and {_NET + theirs!r} is {[*found[theirs][0].shape]}"
        for mine, theirs in pairs
        if found[theirs][0].shape != own[mine].shape
    ]
    if len(found) != len(own) or wrong:
        counts = f"the model has {len(own)} {kind}, and the checkpoint {len(found)}"
        raise ModeconnError(
            f"the checkpoint does not fit the model: "
            f"{listed(wrong) if len(found) == len(own) else counts}: expected the "
            "architecture's base model, whose tensors are matched in order"
        )
    return {mine: found[theirs] for mine, theirs in pairs}


def _buffer_names(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_buffers())


def _ties(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter, by all its names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in named}
