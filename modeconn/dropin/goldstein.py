"""Loss surfaces as github.com/tomgoldstein/loss-landscape makes them (Li et al. 2018), in one pass.

Directions and surfaces are its HDF5 files: what either program has written the other one reads, and
continues where values are missing. `crunch`, `load_directions`, `create_random_direction` and
`create_target_direction` take its scripts' arguments; `surface` is the same for Python, and
`modeconn surface` for the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.dropin import surface_file as files
from modeconn.dropin.goldstein_directions import (
    DIR_TYPES,
    IGNORES,
    NORMS,
    Direction,
    create_random_direction,
    create_target_direction,
    entries,
    load_directions,
    one_of,
    path_along,
    state_of,
    write_directions,
)
from modeconn.dropin.surface_file import SurfaceFile
from modeconn.errors import ModeconnError
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.result import PathResult
from modeconn.files.fingerprints import digest_of, digest_of_tensors
from modeconn.files.writing import locked, sweep
from modeconn.parameters.paths import Path as ParameterPath
from modeconn.parameters.state import State

__all__ = [
    "DIR_TYPES",
    "IGNORES",
    "LOSSES",
    "NORMS",
    "check_surface",
    "create_random_direction",
    "create_target_direction",
    "crunch",
    "load_directions",
    "path_along",
    "read_surface",
    "surface",
    "write_directions",
]

LOSSES = ("crossentropy", "mse")
# Points of a file that has values already are computed again, so many of them, and are to agree so
# well: other hardware rounds, another network or data set does not agree.
_PROBES, _TOLERANCE = 3, 0.01

# A range of coordinates: lowest, highest, how many.
Range = tuple[float, float, int]


def surface(
    net: nn.Module,
    data: Any,
    surf_file: str | os.PathLike[str],
    dir_file: str | os.PathLike[str],
    x: Range = (-1.0, 1.0, 51),
    y: Range | None = None,
    *,
    dir_type: str = "weights",
    split: str = "train",
    loss_name: str = "crossentropy",
    **options: Any,
) -> PathResult:
    """Compute what a surface file lacks of loss and accuracy, in one pass over the data.

    The file is written whole or not at all. After an interruption the same call goes on, from a
    file with the suffix ".unfinished" beside it.

    Args:
        net: the network at the origin.
        data: as `modeconn.evaluate` takes it.
        surf_file: the surface, new, or to be continued.
        dir_file: the directions, as `write_directions` or the original has written them.
        x: range of the first axis: lowest, highest, and how many coordinates.
        y: that of the second, which there is where there are two directions.
        dir_type: "weights" or "states": what the directions are of.
        split: "train" or "test", the beginning of the names of the two tables.
        loss_name: "crossentropy", or "mse" of the softmax and the one-hot class.
        options: further arguments of `modeconn.evaluate`, such as `batch_size` and `progress`.

    Returns:
        The surface as `read_surface` reads it.

    Raises:
        ModeconnError: bad input; a file of another model, or one that another process writes.
    """
    axes = _axes(x, y)
    directions = load_directions(dir_file, net)
    if len(directions) < len(axes):
        raise ModeconnError(f"{dir_file}: has one direction: expected two, as y is {y}")
    path = path_along(net, directions[: len(axes)], dir_type)
    with locked(surf_file):
        found = _opened(surf_file, axes)
        keys = f"{split}_loss", f"{split}_acc"
        _fill(found, net, path, data, keys, loss_name, str(dir_file), _defaults(dir_type) | options)
    return read_surface(surf_file, split)


def check_surface(surf_file: str | os.PathLike[str], x: Range, y: Range | None = None) -> None:
    """Raise a ModeconnError where a surface file is there already and has other axes, or none.

    Args:
        surf_file: the file.
        x: range of the first axis.
        y: that of the second, if any.
    """
    _opened(surf_file, _axes(x, y))


def crunch(
    surf_file: str,
    net: nn.Module,
    w: Sequence[Tensor],
    s: Mapping[str, Tensor],
    d: Sequence[Direction],
    dataloader: Any,
    loss_key: str,
    acc_key: str,
    comm: Any = None,
    rank: int = 0,
    args: Any = None,
    **options: Any,
) -> None:
    """Fill in what two tables of a surface file lack: the original's function, in one pass.

    Args:
        surf_file: the surface, whose axes are there already.
        net: the architecture.
        w: the parameters at the origin, in order.
        s: the state dict at the origin.
        d: one or two directions.
        dataloader: as `modeconn.evaluate` takes it.
        loss_key: the name of the table of losses.
        acc_key: that of accuracies, in percent.
        comm: not used: one process computes all points.
        rank: that process has rank 0; others return at once.
        args: has `dir_type`, `loss_name` and `cuda`, as the original's.
        options: further arguments of `modeconn.evaluate`.

    Raises:
        ModeconnError: bad input; a file of another model, or one that another process writes.
    """
    if rank != 0:
        return
    dir_type = getattr(args, "dir_type", "weights")
    origin: State = {name: value.detach().clone() for name, value in s.items()}
    if dir_type == "weights":
        origin |= state_of(net, [*entries(net, dir_type)], w, dir_type)
    path = path_along(origin, d, dir_type, net=net)
    more = {"device": "cuda"} if getattr(args, "cuda", False) else {}
    with locked(surf_file):
        found = SurfaceFile.read(surf_file)
        loss_name = getattr(args, "loss_name", LOSSES[0])
        given = _defaults(dir_type) | more | options
        _fill(found, net, path, dataloader, (loss_key, acc_key), loss_name, "", given)


def read_surface(surf_file: str | os.PathLike[str], split: str = "train") -> PathResult:
    """Read a surface file, the original's or ours, as a result: to plot it, for instance.

    Args:
        surf_file: the file.
        split: "train" or "test", the beginning of the names of its tables.

    Returns:
        `t` in the flat order of its tables, `loss`, and `error` as a fraction; NaN where a value is
        missing.

    Raises:
        ModeconnError: it is no such file, or lacks the tables; h5py is not installed.
    """
    found = SurfaceFile.read(surf_file)
    keys = f"{split}_loss", f"{split}_acc"
    if keys[0] not in found.tables:
        known = ", ".join(sorted(found.tables)) or "none"
        raise ModeconnError(f"{surf_file}: has no table {keys[0]!r}; its tables are {known}")
    loss, accuracy = (found.table(key) for key in keys)
    missing = loss <= 0
    values = {
        "loss": np.where(missing, np.nan, loss),
        "error": np.where(missing | (accuracy < 0), np.nan, 1.0 - accuracy / 100.0),
    }
    return PathResult(t=found.points(), values=values, samples=0, passes=0, backend="", seconds=0.0)


def _fill(
    found: SurfaceFile,
    net: nn.Module,
    path: ParameterPath,
    data: Any,
    keys: tuple[str, str],
    loss_name: str,
    dir_file: str,
    options: dict[str, Any],
) -> None:
    """Compute the missing values of two tables, and write them."""
    one_of("loss_name", loss_name, LOSSES)
    if path.dim != len(found.shape):
        raise ModeconnError(
            f"{found.file}: has {len(found.shape)} axes: expected {path.dim}, one per direction"
        )
    digest = _digest(path, loss_name, options)
    tables = {key: found.table(key).copy() for key in keys}
    missing = np.flatnonzero(tables[keys[0]] <= 0)
    known = np.flatnonzero(tables[keys[0]] > 0)
    # the original's files have no digests, and ours say nothing of the data
    if any(written != digest for written in found.digests.values()):
        raise _foreign(found.file, "it says so itself")
    probes = known[np.linspace(0, len(known) - 1, min(_PROBES, len(known))).astype(int)]
    if not missing.size:
        return
    points = found.points()[np.concatenate([probes, missing])]
    unfinished = Path(f"{found.file}.unfinished")
    loss = "cross_entropy" if loss_name == "crossentropy" else softmax_mse
    given = {"metrics": ("loss", "error"), "loss": loss, "resume": unfinished} | options
    result = evaluate(net, path, data, points, distributed=False, **given)
    values = result.loss, 100.0 * (1.0 - result.error)
    _check_probes(found.file, tables[keys[0]][probes], values[0][: len(probes)])
    for key, column in zip(keys, values):
        tables[key][missing] = column[len(probes) :]
    found.write(dir_file, tables, digest)
    unfinished.unlink(missing_ok=True)


def softmax_mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean square of softmax less one-hot class, [N]: the original's "mse"."""
    expected = F.one_hot(targets.long(), outputs.shape[-1]).to(outputs)
    return (outputs.softmax(-1) - expected).square().mean(-1)


def _axes(x: Range, y: Range | None) -> list[np.ndarray]:
    ranges = [x] if y is None else [x, y]
    return [np.linspace(low, high, int(count)) for low, high, count in ranges]


def _opened(surf_file: str | os.PathLike[str], axes: Sequence[np.ndarray]) -> SurfaceFile:
    """Read a surface, or describe a new one; its axes are to be these."""
    target = Path(surf_file)
    sweep(target)
    y = axes[1] if len(axes) > 1 else None
    if not target.exists():
        if not target.parent.is_dir():
            raise ModeconnError(f"{target}: the folder {target.parent} does not exist")
        files.hdf5()  # not to be missed after the pass
        return SurfaceFile(target, axes[0], y)
    found = SurfaceFile.read(target)
    for name, there, here in (("xcoordinates", found.x, axes[0]), ("ycoordinates", found.y, y)):
        same = there is None if here is None else there is not None and there.shape == here.shape
        if not same or (there is not None and here is not None and not np.allclose(there, here)):
            raise ModeconnError(
                f"{target}: its {name} are {_range(there)}, and {_range(here)} was asked for: name "
                "another file"
            )
    return found


def _range(axis: np.ndarray | None) -> str:
    return "none" if axis is None else f"{axis[0]:g}:{axis[-1]:g}:{len(axis)}"


def _check_probes(file: Path, written: np.ndarray, computed: np.ndarray) -> None:
    if not np.allclose(computed, written, rtol=_TOLERANCE, atol=1e-6, equal_nan=True):
        i = int(np.argmax(np.abs(computed - written)))
        raise _foreign(file, f"a loss in it is {written[i]:.5g}, and is {computed[i]:.5g} here")


def _foreign(file: Path, why: str) -> ModeconnError:
    return ModeconnError(
        f"{file} is of another model, direction, loss or data ({why}): name another file"
    )


def _digest(path: ParameterPath, loss_name: str, options: Mapping[str, Any]) -> str:
    """Return the digest of what decides the values, but for the data and how they are read."""
    weights = [digest_of_tensors(point) for point in path.control_points]
    return digest_of([weights, loss_name, options["buffers"]])


def _defaults(dir_type: str) -> dict[str, Any]:
    """Return the defaults of evaluation; parameters' directions leave running statistics alone."""
    return {"buffers": "start" if dir_type == "weights" else "interpolate"}
