"""A network's inputs: one tensor, or several as a tuple (by position) or a dict (by name).

Axis 0 of each tensor is that of the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn

# A tuple of tensors or a dict of them is one batch of inputs.
Inputs = Union[Tensor, "tuple[Tensor, ...]", "dict[str, Tensor]"]


def leaves(inputs: Inputs) -> list[Tensor]:
    """Return the tensors, in order."""
    if isinstance(inputs, Tensor):
        return [inputs]
    return list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)


def keys(inputs: Inputs) -> list[Any]:
    """Return the key of each tensor: None, its place in a tuple, or its name in a dict."""
    if isinstance(inputs, Tensor):
        return [None]
    return list(inputs) if isinstance(inputs, Mapping) else list(range(len(inputs)))


def rows(inputs: Inputs) -> int:
    """Return the number of samples."""
    return len(leaves(inputs)[0])


def apply(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply a function to each tensor, and keep the structure."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: function(value) for key, value in inputs.items()}
    return tuple(map(function, inputs))


def moved(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return inputs on a device, floating point in a dtype; integers (tokens) stay integers."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    return apply(move, inputs)


def moved_like(inputs: Inputs, state: Mapping[str, Tensor]) -> Inputs:
    """Return inputs on the device and in the dtype of a network's floating-point tensors."""
    first = next((value for value in state.values() if value.is_floating_point()), None)
    return inputs if first is None else moved(inputs, first.dtype, first.device)


def take(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Return samples start to stop."""
    return apply(lambda tensor: tensor[start:stop], inputs)


def join(parts: Sequence[Inputs]) -> Inputs:
    """Concatenate batches of equal structure."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))  # type: ignore[arg-type]
    if isinstance(first, Mapping):
        return {key: _concatenated(parts, key) for key in first}
    return tuple(_concatenated(parts, place) for place in range(len(first)))


def _concatenated(parts: Sequence[Any], key: Any) -> Tensor:
    return torch.cat([part[key] for part in parts])


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Call a model: tuples are passed by position, dicts by name."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the positional and the keyword arguments of a call."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})


def describe(inputs: Inputs) -> str:
    """Describe shapes and dtypes, as "['N', 3] and dtype float32", or several of them by name."""
    parts = []
    for key, tensor in zip(keys(inputs), leaves(inputs)):
        text = f"{['N', *tensor.shape[1:]]} and dtype {str(tensor.dtype).removeprefix('torch.')}"
        parts.append(text if key is None else f"{key}: {text}")
    return "; ".join(parts)
