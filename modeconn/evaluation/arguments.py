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
from modeconn.parameters.configs import check_ignore, config_of, refuse_different_forwards
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
        # PyTorch goes on to list all that it could have been built with
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ModeconnError(
            f"device {str(device)!r} cannot be used: {reason}: expected one that this PyTorch has, "
            "such as cpu"
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
    """Fit a path to a model that is used as it is: what it ties has one value everywhere.

    Args:
        model: the architecture.
        path: names of files become the model's.

    Raises:
        ModeconnError: the model has no memory, or the path has other parameters and buffers, or two
            values for what the model ties.
    """
    for one, other, name in _pulled_apart(model, path):
        raise _two_values(model, one, other, name)


def fitted(model: nn.Module, path: Path) -> nn.Module:
    """Fit a path to a model, and return the module to evaluate it with.

    That is the model, or a copy with tensors of their own where networks of the path have different
    values for what the model ties.

    Args:
        model: the architecture.
        path: names of files become the model's.

    Raises:
        ModeconnError: the model has no memory, or the path has other parameters and buffers; its
            directions pull apart what the model ties.
    """
    apart = _pulled_apart(model, path)
    if not apart:
        return model
    if path.directions:
        raise _two_values(model, *apart[0])
    model = unwrapped(model)
    pairs = [(one, other) for one, other, _ in apart]
    _warn_of_untied(model, pairs)
    return untied(model, pairs)


def _pulled_apart(model: nn.Module, path: Path) -> list[tuple[str, str, str]]:
    """Give a path the model's names; return names of one tensor that have two values in it.

    Returns:
        Both names, and that of the first control point in which they differ.
    """
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
    fit_path(path, model)
    states.match(
        [own, path.control_points[0]],
        [f"the model {type(model).__name__}", path.names[0]],
        devices=False,
        dtypes=False,
    )
    apart = []
    for one, other in tied(own):
        for point, name in zip(path.control_points, path.names):
            a, b = point[one], point[other]
            if not same_memory(a, b) and not torch.equal(a, b):
                apart.append((one, other, name))
                break
        else:
            _check_blocks(model, path, one, other)
    return apart


def _check_blocks(model: nn.Module, path: Path, one: str, other: str) -> None:
    """Raise where two names of one tensor would move apart."""
    if path.blocks is not None and path.blocks.of.get(one) != path.blocks.of.get(other):
        raise ModeconnError(
            f"groups: '{one}' and '{other}' are one tensor in the model "
            f"{type(model).__name__}, and would move apart: expected both in one group"
        )


def _two_values(model: nn.Module, one: str, other: str, name: str) -> ModeconnError:
    return ModeconnError(
        f"{name} has different values for '{one}' and '{other}', which are one tensor "
        f"in the model {type(unwrapped(model)).__name__}: give both names one value (Plane.random "
        "does so where it is given the module), or untie them in the model"
    )


def _warn_of_untied(model: nn.Module, pairs: list[tuple[str, str]]) -> None:
    """Warn that values of their own are used for names that the model ties.

    A module that stands under two names has one value: the last, as by load_state_dict.
    """
    what = f"which the model {type(model).__name__} ties"
    shared = [pair for pair in pairs if _in_one_module(model, *pair)]
    texts = [f"'{one}' and '{other}'" for one, other in pairs if (one, other) not in shared]
    if texts:
        warn(
            f"networks of the path have different values for {listed(texts)}, {what}: all are "
            "evaluated with tensors of their own for them, as the files have it"
        )
    if shared:
        texts = [f"'{one}' and '{other}'" for one, other in shared]
        warn(
            f"networks of the path have different values for {listed(texts)}, {what}, one module "
            "under two names: all are evaluated with the second of each, as load_state_dict does; "
            "expected one value, or a model with two modules"
        )


def _in_one_module(model: nn.Module, one: str, other: str) -> bool:
    owners = [model.get_submodule(name.rpartition(".")[0]) for name in (one, other)]
    return owners[0] is owners[1] and one.rpartition(".")[2] == other.rpartition(".")[2]


def check_forwards(model: nn.Module, path: Path, ignore: Collection[str]) -> None:
    """Raise where configs of the model and of folders on a path give different forwards.

    Modules on a path are compared with the model when it is captured.

    Args:
        model: the architecture; it counts where it has a config, as those of transformers have.
        path: the path.
        ignore: entries that may differ.
    """
    check_ignore(ignore)
    folders = [
        (config, name)
        for config, name, is_file in zip(path.configs, path.names, path.files)
        if is_file
    ]
    if any(config is not None for config, _ in folders):
        model = unwrapped(model)
        named = [(config_of(model), f"the model {type(model).__name__}"), *folders]
        configs, names = [config for config, _ in named], [name for _, name in named]
        refuse_different_forwards(configs, names, ignore)


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
