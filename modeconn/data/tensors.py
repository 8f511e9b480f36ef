"""The user's arrays as tensors: one or several inputs, with their rows, checked and sliced."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.data.inputs import Inputs, keys, leaves
from modeconn.errors import ModeconnError

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def as_inputs(value: Any, what: str) -> Inputs:
    """Return inputs as a tensor with rows, or as a tuple or dict of them.

    Args:
        value: a tensor or array, or several in a tuple, list or dict.
        what: names the value in messages.

    Raises:
        ModeconnError: the value is none of these.
    """
    if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
        return {key: as_tensor(part, f"{what}[{key!r}]") for key, part in value.items()}
    if isinstance(value, (tuple, list)) and value and all(map(_is_array, value)):
        return tuple(as_tensor(part, f"{what}[{i}]") for i, part in enumerate(value))
    return as_tensor(value, what)


def as_tensor(value: Any, what: str) -> Tensor:
    """Return a tensor or array as a tensor with rows, sharing memory where torch can.

    Unsigned integers of two bytes and more become int64.

    Raises:
        ModeconnError: the value is neither, or a single number; `what` names it.
    """
    if isinstance(value, np.ndarray):
        value = _from_numpy(value, what)
    scalar = isinstance(value, Tensor) and value.ndim == 0
    if scalar or isinstance(value, (int, float, np.generic)):
        raise ModeconnError(
            f"{what} is a single number; expected one row per sample "
            "(for data of single samples pass DataLoader(data, batch_size=...))"
        )
    if not isinstance(value, Tensor):
        several = ", or a tuple or dict of them" if what.endswith("inputs") else ""
        raise ModeconnError(
            f"{what} of type {type(value).__name__}; expected a tensor or numpy array{several}"
        )
    # Torch has these dtypes, and hardly an operation for them.
    return value.long() if value.dtype in _UNSIGNED else value


def _from_numpy(array: np.ndarray, what: str) -> Tensor:
    backwards = any(stride < 0 for stride in array.strides)
    if backwards or not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))  # torch takes none of these as they are
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise ModeconnError(
            f"{what}: a numpy array of dtype {array.dtype}; expected numbers that torch has"
        ) from None


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def row_kind(inputs: Inputs) -> str:
    """Describe a row: shape, dtype and device of each input."""
    parts = []
    for key, tensor in zip(keys(inputs), leaves(inputs)):
        name = "" if key is None else f"{key}: "
        parts.append(f"{name}{list(tensor.shape[1:])} {tensor.dtype} on {tensor.device}")
    return ", ".join(parts)


def each(function: Callable[[Any], Any], inputs: Any) -> Any:
    """Apply a function to each of several inputs, or to the only one."""
    if isinstance(inputs, Mapping):
        return {key: function(part) for key, part in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, (tuple, list)) else function(inputs)


def check_lengths(inputs: Any, targets: Tensor | np.ndarray, where: str) -> None:
    """Raise a ModeconnError unless every input has as many rows as there are targets."""
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs
    for part in parts if isinstance(inputs, (Mapping, tuple, list)) else [inputs]:
        if len(part) != len(targets):
            raise ModeconnError(
                f"{where}: {len(part):,} inputs but {len(targets):,} targets; "
                "expected one target per input"
            )


def slice_rows(
    inputs: Any, targets: Tensor | np.ndarray, start: int, stop: int
) -> tuple[Inputs, Tensor]:
    """Return rows start to stop of inputs and targets: views where possible."""
    return each(lambda part: _slice(part, start, stop), inputs), _slice(targets, start, stop)


def _slice(array: Tensor | np.ndarray, start: int, stop: int) -> Tensor:
    """Return rows start to stop: a view where possible, a copy if they come from a memory map."""
    part = array[start:stop]
    if isinstance(part, Tensor):
        return part
    mapped = _memory_map(part)
    if mapped is None:
        return as_tensor(part, "data")
    tensor = as_tensor(np.array(part), "data")
    _release(part, mapped)
    return tensor


def _memory_map(array: np.ndarray) -> mmap.mmap | None:
    """Return the file mapping that the array reads from, if it may be released."""
    owner: Any = array
    mapped = False
    while isinstance(owner, np.ndarray):
        # In mode "c" the pages hold the user's own changes, which releasing would lose.
        mapped = mapped or (isinstance(owner, np.memmap) and owner.mode != "c")
        owner = owner.base
    return owner if mapped and isinstance(owner, mmap.mmap) else None


def _release(rows: np.ndarray, mapped: mmap.mmap) -> None:
    """Tell the system that the rows' pages have been read.

    Without this they stay resident until memory runs short, and a long file fills it. They can be
    read again at any time.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    start = (rows.ctypes.data - base) // mmap.PAGESIZE * mmap.PAGESIZE
    length = rows.ctypes.data - base + max(rows.strides[0], 0) * len(rows) - start
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, start, min(length, len(mapped) - start))
