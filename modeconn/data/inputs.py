"""A network's inputs: one tensor, or several as a tuple (by position) or a dict (by name); axis 0 is the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn

# A tuple of tensors or a dict of them is one batch of inputs.
Inputs = Union[Tensor, "tuple[Tensor, ...]", "dict[str, Tensor]"]


def leaves(inputs: Inputs) -> list[Tensor]:
    """The tensors, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)


def keys(inputs: Inputs) -> list[Any]:
    """What names each tensor: None for the only one, its place in a tuple, its name in a dict."""
    if isinstance(inputs, Tensor):
        return [None]
    return list(inputs) if isinstance(inputs, Mapping) else list(range(len(inputs)))


def rows(inputs: Inputs) -> int:
    """The number of samples."""
    return len(leaves(inputs)[0])


def apply(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """A function of each tensor, in the same structure."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: function(value) for key, value in inputs.items()}
    return tuple(map(function, inputs))


def moved(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Inputs as they are computed with; integers (tokens) stay integers."""
    return apply(
        lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None), inputs
    )


def take(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Samples start to stop."""
    return apply(lambda tensor: tensor[start:stop], inputs)


def join(parts: Sequence[Inputs]) -> Inputs:
    """Batches of one structure, one after the other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))  # type: ignore[arg-type]
    if isinstance(first, Mapping):
        return {key: torch.cat([part[key] for part in parts]) for key in first}  # type: ignore[index, call-overload]
    return tuple(torch.cat([part[i] for part in parts]) for i in range(len(first)))  # type: ignore[index]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output: tuples are passed by position, dicts by name."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and keyword arguments of a call."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def describe(inputs: Inputs) -> str:
    """Shapes and dtypes, for messages: "['N', 3] float32", or several of them by name."""
    parts = []
    for key, tensor in zip(keys(inputs), leaves(inputs)):
        text = f"{['N', *tensor.shape[1:]]} and dtype {str(tensor.dtype).removeprefix('torch.')}"
        parts.append(text if key is None else f"{key}: {text}")
    return "; ".join(parts)
