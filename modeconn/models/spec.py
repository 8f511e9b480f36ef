"""Options in a model's spec, NAME:key=value,key=value, checked against its constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.files.memory import main_memory

# Beyond what fits a machine, so that a slip of typing fails here and not in the allocator.
MOST_PARAMETERS = 10**10
# Layers are modules of Python, some kilobytes each whatever their width: more are a slip of typing.
MOST_LAYERS = 10_000
_BYTES = 4  # of a parameter


def check_size(spec: str, parameters: int) -> None:
    """Raise a ModeconnError for a model whose weights do not fit this machine's memory."""
    if parameters > MOST_PARAMETERS:
        raise ModeconnError(
            f"model {spec!r} has {parameters:,} parameters: expected at most {MOST_PARAMETERS:,}"
        )
    memory = main_memory()
    if memory and parameters * _BYTES > memory:
        raise ModeconnError(
            f"model {spec!r} has {parameters:,} parameters, {parameters * _BYTES:,} bytes in "
            f"float32: expected at most this machine's memory, {memory:,} bytes"
        )


def call(spec: str, make: Callable[..., nn.Module], fixed: Mapping[str, Any]) -> nn.Module:
    """Call a model's constructor with the options of a spec.

    Args:
        spec: NAME or NAME:key=value,…; values are whole numbers, true or false, or words, as the
            defaults are.
        make: the constructor; all of its arguments are keywords with a default.
        fixed: arguments that the name itself stands for.

    Raises:
        ModeconnError: an option that is unknown, given twice, or has a value of another kind; a
            model that is too large.
    """
    options = {**_options(spec, make, fixed), **fixed}
    for name in ("depth", "layers"):
        if options.get(name, 0) > MOST_LAYERS:
            raise ModeconnError(
                f"model {spec!r}: {name} is {options[name]:,}: expected at most {MOST_LAYERS:,}, "
                "as each layer is a module of its own"
            )
    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in make(**options).parameters())
    except (ModeconnError, RuntimeError) as error:  # sizes beyond what PyTorch can count
        raise ModeconnError(f"model {spec!r}: {str(error).splitlines()[0]}") from None
    check_size(spec, parameters)
    return make(**options)


def describe(make: Callable[..., nn.Module], fixed: Mapping[str, Any]) -> list[str]:
    """List the options that a constructor takes, with their defaults: ["width=64", …]."""
    return [f"{name}={_text(default)}" for name, default in _defaults(make, fixed).items()]


def _defaults(make: Callable[..., nn.Module], fixed: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: p.default
        for name, p in inspect.signature(make).parameters.items()
        if name not in fixed
    }


def _options(spec: str, make: Callable[..., nn.Module], fixed: Mapping[str, Any]) -> dict[str, Any]:
    _, colon, text = spec.partition(":")
    if not colon:
        return {}
    defaults = _defaults(make, fixed)
    options: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name not in defaults:
            expected = ", ".join(describe(make, fixed))
            raise ModeconnError(
                f"model {spec!r}: option {name!r} is not known: expected some of {expected}"
            )
        if not equals:
            raise ModeconnError(
                f"model {spec!r}: option {name!r} has no value: "
                f"expected such as {name}={_text(defaults[name])}"
            )
        if name in options:
            raise ModeconnError(f"model {spec!r}: option {name!r} is given twice")
        options[name] = _value(spec, name, value, defaults[name])
    return options


def _value(spec: str, name: str, value: str, default: Any) -> Any:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise ModeconnError(f"model {spec!r}: {name} is {value!r}: expected true or false")
        return value == "true"
    if isinstance(default, str):
        return value
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise ModeconnError(
            f"model {spec!r}: {name} is {value!r}: expected a whole number of at least 1"
        )
    return int(value)


def _text(default: Any) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)
