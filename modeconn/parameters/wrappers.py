"""Modules that wrap the network that a user means."""

from __future__ import annotations

from typing import Any

from torch import nn

from modeconn.errors import ModeconnError


def unwrapped(model: Any) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel, AveragedModel or torch.compile.

    Raises:
        ModeconnError: it is no module.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise ModeconnError(
            f"the model is the class {model.__name__}: expected a network, {model.__name__}(…)"
        )
    if not isinstance(model, nn.Module):
        raise ModeconnError(
            f"the model is of type {type(model).__name__}: expected a torch.nn.Module"
        )
    kind = type(model).__name__
    if kind in ("DataParallel", "DistributedDataParallel", "AveragedModel"):
        return unwrapped(model.module)
    return unwrapped(model._orig_mod) if kind == "OptimizedModule" else model


def name_of(source: Any, k: int) -> str:
    """Returns what messages call the k-th of some networks: the name of its file, if it has one."""
    is_file = isinstance(source, (str, bytes)) or hasattr(source, "__fspath__")
    return str(source) if is_file else f"control point {k}"
