"""Checks of the arguments that `evaluate`, `explain` and `forward` share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from modeconn.capture.trial import duplicate
from modeconn.errors import ModeconnError, listed, warn
from modeconn.parameters import state as states
from modeconn.parameters.comparison import same_memory, tied
from modeconn.parameters.configs import config_of, refuse_different_forwards
from modeconn.parameters.fitting import fit_path
from modeconn.parameters.paths import Path
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


def check_fit(model: nn.Module, path: Path, untie: bool = True) -> nn.Module:
    """Fit a path to a model, and return the module to evaluate it with.

    That is the model, or a copy with tensors of their own where networks of the path have different
    values for what the model ties.

    Args:
        model: the architecture.
        path: names of files become the model's.
        untie: whether such a copy will do; if not, such networks are refused.

    Raises:
        ModeconnError: the model has no memory, or the path has other parameters and buffers; its
            directions pull apart what the model ties.
    """
    whole, model = model, unwrapped(model)
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
    fit_path(path, model)
    states.match(
        [own, path.control_points[0]],
        [f"the model {type(model).__name__}", path.names[0]],
        devices=False,
        dtypes=False,
    )
    apart = _pulled_apart(model, own, path, untie)
    return untied(model, apart) if apart else whole


def check_forwards(model: nn.Module, path: Path, ignore: Collection[str]) -> None:
    """Raise where configs of the model and of folders on a path give different forwards.

    Modules on a path are compared with the model when it is captured.

    Args:
        model: the architecture; it counts where it has a config, as those of transformers have.
        path: the path.
        ignore: entries that may differ.
    """
    if isinstance(ignore, str):
        raise ModeconnError(f"ignore is {ignore!r}: expected names of entries, ({ignore!r},)")
    folders = [
        (config, name)
        for config, name, is_file in zip(path.configs, path.names, path.files)
        if is_file
    ]
    if any(config is not None for config, _ in folders):
        model = unwrapped(model)
        named = [(config_of(model), f"the model {type(model).__name__}"), *folders]
        refuse_different_forwards(*map(list, zip(*named)), ignore)


def _pulled_apart(
    model: nn.Module, own: states.State, path: Path, untie: bool
) -> list[tuple[str, str]]:
    """The names of one tensor of the model that have two values in a control point.

    Raises:
        ModeconnError: there are some, and they are not meant: directions move tied weights apart.
    """
    apart = []
    for one, other in tied(own):
        for point, name in zip(path.control_points, path.names):
            a, b = point[one], point[other]
            if same_memory(a, b) or torch.equal(a, b):
                continue
            if not untie or path.directions:
                raise ModeconnError(
                    f"{name} has different values for '{one}' and '{other}', which are one tensor "
                    f"in the model {type(model).__name__}: give both names one value (Plane.random "
                    "does so where it is given the module), or untie them in the model"
                )
            apart.append((one, other))
            break
        else:
            if path.blocks is not None and path.blocks.of.get(one) != path.blocks.of.get(other):
                raise ModeconnError(
                    f"groups: '{one}' and '{other}' are one tensor in the model "
                    f"{type(model).__name__}, and would move apart: expected both in one group"
                )
    if apart:
        pairs = listed([f"'{one}' and '{other}'" for one, other in apart])
        warn(
            f"networks of the path have different values for {pairs}, which the model "
            f"{type(model).__name__} ties: all are evaluated with tensors of their own for them, "
            "as the files have it"
        )
    return apart


def untied(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """Return a copy of a module in which the second name of each pair is a tensor of its own."""
    made = duplicate(model)
    for _, name in pairs:
        place, _, attribute = name.rpartition(".")
        owner = made.get_submodule(place)
        value = getattr(owner, attribute)
        if isinstance(value, nn.Parameter):
            setattr(owner, attribute, nn.Parameter(value.detach().clone(), value.requires_grad))
        else:
            setattr(owner, attribute, value.detach().clone())
    return made


def positive(name: str, value: Any) -> int | None:
    """Check that a value is a whole number of at least one, or None for the default."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ModeconnError(f"{name} is {value!r}: expected a whole number, at least 1")
    return value


def _quoted(text: str) -> str:
    return f'"{text}"'
