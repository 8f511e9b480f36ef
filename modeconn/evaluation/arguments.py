"""Checks of the arguments that `evaluate`, `explain` and `forward` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.parameters import state as states
from modeconn.parameters.comparison import same_memory, tied
from modeconn.parameters.paths import Path
from modeconn.parameters.prefixes import give_back_prefix
from modeconn.parameters.wrappers import unwrapped

BUFFERS = ("interpolate", "start", "recompute")
# The dtype of values; "tf32" and "bf16" are those of the factors of products, on a GPU.
PRECISIONS = {
    "float32": torch.float32,
    "float64": torch.float64,
    "tf32": torch.float32,
    "bf16": torch.float32,
}


def dtype_of(precision: str) -> torch.dtype:
    """Return the dtype to compute in."""
    if precision not in PRECISIONS:
        raise ModeconnError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def device_of(device: str | torch.device | None, path: Path) -> torch.device:
    """Return the device to compute on: by default that of the path's control points."""
    if device is None:
        return next(iter(path.control_points[0].values())).device
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ModeconnError(
            f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}"
        ) from None
    return where


def frozen_entries(buffers: str, path: Path, data: bool = True) -> frozenset[str]:
    """Return the names of tensors that do not move along the path.

    They are masks, and norms' running statistics where those of the path's start are requested.

    Args:
        buffers: "interpolate", "start" or "recompute".
        path: the path.
        data: whether there are data to recompute the statistics from.
    """
    allowed = BUFFERS if data else BUFFERS[:2]
    if buffers not in allowed:
        raise ModeconnError(
            f"buffers is {buffers!r}: expected {' or '.join(map(_quoted, allowed))}"
        )
    statistics = ("running_mean", "running_var")
    return path.fixed | {
        key for key in path.control_points[0] if buffers == "start" and key.endswith(statistics)
    }


def check_fit(model: nn.Module, path: Path) -> None:
    """Raise a ModeconnError unless the model has memory, and the path's parameters and buffers."""
    model = unwrapped(model)
    state = model.state_dict()
    own = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    named = [*model.named_parameters(), *model.named_buffers()]
    nowhere = [name for name, tensor in named if tensor.is_meta]
    if nowhere:
        raise ModeconnError(
            f"the model {type(model).__name__} has {len(nowhere)} tensors on the meta device, "
            f'{nowhere[0]!r} first: allocate them by model.to_empty(device="cpu"), and the path '
            "has the weights"
        )
    give_back_prefix(path, own)
    states.match(
        [own, path.control_points[0]],
        [f"the model {type(model).__name__}", path.names[0]],
        devices=False,
        dtypes=False,
    )
    _check_ties(model, own, path)


def _check_ties(model: nn.Module, own: states.State, path: Path) -> None:
    """Raise where names of one tensor of the model have two values in a control point."""
    for one, other in tied(own):
        for point, name in zip(path.control_points, path.names):
            a, b = point[one], point[other]
            if not same_memory(a, b) and not torch.equal(a, b):
                raise ModeconnError(
                    f"{name} has different values for '{one}' and '{other}', which are one tensor "
                    f"in the model {type(model).__name__}: give both names one value (Plane.random "
                    "does so where it is given the module), or untie them in the model"
                )


def positive(name: str, value: Any) -> int | None:
    """Check that a value is a whole number of at least one, or None for the default."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ModeconnError(f"{name} is {value!r}: expected a whole number, at least 1")
    return value


def _quoted(text: str) -> str:
    return f'"{text}"'
