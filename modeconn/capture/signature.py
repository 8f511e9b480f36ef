"""Arguments of a call by their names in the operation's schema."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from modeconn.errors import ModeconnError

_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """A parameter of an operation.

    Attributes:
        default: `inspect.Parameter.empty` where it has none.
        keyword_only: whether it can be given by name alone.
    """

    name: str
    default: Any
    keyword_only: bool


def parameters_of(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """Returns the parameters of an operation of PyTorch or of a Python function, in order.

    Raises:
        ModeconnError: the function takes a variable number of arguments.
    """
    if isinstance(function, torch._ops.OpOverload):
        return _of_operator(function)
    # Methods and objects are read anew each time: a cache would keep their modules alive.
    return _of_function(function) if inspect.isfunction(function) else _inspected(function)


@functools.lru_cache(maxsize=1024)
def _of_operator(operation: torch._ops.OpOverload) -> tuple[Parameter, ...]:
    parameters = []
    for argument in operation._schema.arguments:
        default = argument.default_value if argument.has_default_value() else _REQUIRED
        parameters.append(Parameter(argument.name, default, argument.kwarg_only))
    return tuple(parameters)


@functools.lru_cache(maxsize=1024)
def _of_function(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    return _inspected(function)


def _inspected(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ModeconnError(f"{function} takes a variable number of arguments: expected a schema")
    return tuple(Parameter(p.name, p.default, p.kind == p.KEYWORD_ONLY) for p in parameters)


def named(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Names the arguments of a call and fills in the defaults of those that are left out."""
    parameters = parameters_of(function)
    given = dict(zip([p.name for p in parameters], args)) | dict(kwargs or {})
    return {p.name: given.get(p.name, p.default) for p in parameters}


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Calls a function with arguments as `named` gives them."""
    by_name = [p.name for p in parameters_of(function) if p.keyword_only]
    positional = [value for name, value in arguments.items() if name not in by_name]
    return function(*positional, **{name: arguments[name] for name in by_name})
