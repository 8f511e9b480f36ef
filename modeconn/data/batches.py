"""The user's data as batches: any source, always the same rows in the same order, never loaded whole."""

from __future__ import annotations

import mmap
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from modeconn.data.datasets import Images
from modeconn.data.inputs import Inputs, apply, join, keys, leaves, take
from modeconn.errors import ModeconnError

# `Inputs` [B, ...], a tensor or several as a tuple or dict, and targets [B, ...].
Batch = tuple[Any, Tensor]

_ACCEPTED = "(inputs, targets) as tensors or arrays, a torch Dataset or DataLoader, or an iterable of (inputs, targets) batches"
# What the targets are called where inputs and targets come in one dict.
_TARGETS = "labels"


class Batches:
    """Data as (inputs, targets) batches of `batch_size` rows each; only the last may be smaller.

    Iterating is one pass. Rows keep the source's order, and the size of the source's own batches
    makes no difference: they are split and joined, with about two of them in memory at a time.
    Tensors keep their device and dtype. A batch may be a view of the source's memory: use it before
    asking for the next one, and do not write to it.

    Attributes:
        batch_size: Rows in each batch.
        samples: Rows in a pass, or None where that is not known before the first pass is complete.
        passes: Passes begun so far.

    Raises:
        ModeconnError: While iterating: the data is empty; inputs and targets of a batch differ in
            length; rows differ in shape, dtype or device; the data can be read only once, or has
            changed its length.
    """

    def __init__(
        self,
        read: Callable[[], Iterable[Any]],
        batch_size: int,
        *,
        samples: int | None = None,
        once: bool = False,
    ) -> None:
        """Most callers want `as_batches`.

        Args:
            read: Begins a pass over the source's own (inputs, targets) batches.
            batch_size: Rows in each batch, at least 1.
            samples: Rows in a pass, where known.
            once: Whether the source is spent after one pass.

        Raises:
            ModeconnError: `samples` is 0.
        """
        if samples == 0:
            raise _empty()
        self.batch_size = batch_size
        self.samples = samples
        self.passes = 0
        self._read = read
        self._once = once
        self._counted: int | None = None  # rows in the first complete pass

    def __iter__(self) -> Iterator[Batch]:
        if self._once and self.passes:
            raise ModeconnError(
                "data: an iterator can be read only once, and this is a second pass; "
                "expected something that can be read again: a list, a DataLoader, or (inputs, targets)"
            )
        self.passes += 1
        return self._pass(self.passes)

    def _pass(self, number: int) -> Iterator[Batch]:
        seen = 0
        for batch in _regrouped(_checked(self._read()), self.batch_size):
            seen += len(batch[0])
            yield batch
        if self._counted not in (None, seen):
            raise ModeconnError(
                f"data: pass {number} gave {seen:,} samples, the first {self._counted:,}; expected the same "
                "in every pass (can the source be read only once, or does it change?)"
            )
        if seen == 0:
            raise _spent() if self._once else _empty()
        self._counted = self.samples = seen


def as_batches(data: Any, batch_size: int) -> Batches:
    """The data as batches of `batch_size` rows, in the source's own order.

    Nothing is shuffled here, and a DataLoader is used as it is: one that shuffles gives another
    order in each pass, one with drop_last=True leaves its last rows out; its own batch size makes
    no difference.

    Args:
        data: (inputs, targets) as tensors, arrays or memory maps [N, ...], read slice by slice;
            `Images`; a torch Dataset of (inputs, target) samples, joined by torch's
            default_collate; a DataLoader or any other iterable of (inputs, targets) batches. An
            iterator (a generator, say) serves for one pass. `Batches` are returned as they are,
            whatever `batch_size` says. Where a network takes several inputs they are a tuple or a
            dict; inputs and targets may also be one dict, with the targets as "labels".
        batch_size: Rows in each batch, at least 1.

    Raises:
        ModeconnError: The data is of another kind, or empty; inputs and targets differ in length.
    """
    if isinstance(data, Batches):
        return data
    size = _size(batch_size)
    if isinstance(data, TensorDataset):
        data = data.tensors
    if isinstance(data, Images):
        return Batches(partial(_slices, data.slice, len(data), size), size, samples=len(data))
    if isinstance(data, Mapping) and _TARGETS in data:
        data = _pair(data)
    if isinstance(data, (tuple, list)) and data:
        arrays = [isinstance(part, (Tensor, np.ndarray)) for part in data]
        if all(arrays) or (len(data) == 2 and any(arrays)):
            return _from_arrays(data, size)
    if isinstance(data, Dataset):
        return _from_dataset(data, size)
    if isinstance(data, DataLoader):
        return Batches(partial(iter, data), size, samples=_loader_samples(data))
    if isinstance(data, (str, os.PathLike)):
        raise ModeconnError(
            f"data: got the name {str(data)!r}; load it first: mc.datasets.load(name, root=...)"
        )
    readable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, (Mapping, Tensor, np.ndarray)) or not readable:
        raise ModeconnError(f"data: of type {type(data).__name__}; expected {_ACCEPTED}")
    if isinstance(data, (tuple, list)) and not data:
        raise _empty()
    return Batches(partial(iter, data), size, once=isinstance(data, Iterator))


# --------------------------------------------------------------------------------------------
# sources


def _from_arrays(parts: Sequence[Any], size: int) -> Batches:
    if len(parts) != 2:
        raise ModeconnError(
            f"data: got {len(parts)} tensors or arrays; expected two: (inputs, targets)"
        )
    inputs, targets = parts
    as_inputs(_each(_first_row, inputs), "data: inputs")
    _tensor(_first_row(targets), "data: targets")
    _check_lengths(inputs, targets, "data")
    return Batches(
        partial(_slices, partial(_rows, inputs, targets), len(targets), size),
        size,
        samples=len(targets),
    )


def _first_row(part: Any) -> Any:
    return part[:1] if isinstance(part, (Tensor, np.ndarray)) and part.ndim else part


def _each(function: Callable[[Any], Any], inputs: Any) -> Any:
    """A function of each of several inputs, or of the only one."""
    if isinstance(inputs, Mapping):
        return {key: function(part) for key, part in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, (tuple, list)) else function(inputs)


def _pair(batch: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """One dict as inputs and targets."""
    return {key: value for key, value in batch.items() if key != _TARGETS}, batch[_TARGETS]


def _slices(rows: Callable[[int, int], Batch], total: int, size: int) -> Iterator[Batch]:
    for start in range(0, total, size):
        yield rows(start, min(start + size, total))


def _rows(inputs: Any, targets: Tensor | np.ndarray, start: int, stop: int) -> Batch:
    return _each(lambda part: _slice(part, start, stop), inputs), _slice(targets, start, stop)


def _slice(array: Tensor | np.ndarray, start: int, stop: int) -> Tensor:
    """Rows start to stop: a view where possible, a copy if they come from a memory map."""
    part = array[start:stop]
    if isinstance(part, Tensor):
        return part
    mapped = _memory_map(part)
    if mapped is None:
        return _tensor(part, "data")
    tensor = _tensor(np.array(part), "data")
    _release(part, mapped)
    return tensor


def _from_dataset(dataset: Dataset[Any], size: int) -> Batches:
    if isinstance(dataset, IterableDataset):
        return Batches(partial(_collated, dataset, size), size)
    if not hasattr(dataset, "__len__"):
        kind = type(dataset).__name__
        raise ModeconnError(
            f"data: {kind} has no length; expected a Dataset with __len__, or IterableDataset"
        )
    total = len(dataset)
    return Batches(lambda: _collated((dataset[i] for i in range(total)), size), size, samples=total)


def _collated(samples: Iterable[Any], size: int) -> Iterator[Any]:
    # Not a DataLoader: starting one draws from the user's global random state.
    rest = iter(samples)
    while chunk := list(islice(rest, size)):
        yield _collate(chunk)


def _collate(samples: list[Any]) -> Any:
    try:
        return default_collate(samples)
    except (TypeError, RuntimeError) as error:
        raise ModeconnError(
            f"data: the dataset's samples cannot be joined to a batch: {str(error).splitlines()[0]}; "
            "expected tensors, arrays or numbers of equal shape (images need a transform to tensors)"
        ) from error


def _loader_samples(loader: DataLoader[Any]) -> int | None:
    """Rows in a pass, where the loader's own parts tell."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None
    try:
        total = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return total - total % loader.batch_size if loader.drop_last else total


# --------------------------------------------------------------------------------------------
# batches


def _checked(batches: Iterable[Any]) -> Iterator[Batch]:
    """The source's batches as pairs of tensors that fit together."""
    expected: tuple[str, ...] | None = None
    for number, batch in enumerate(batches):
        where = f"data: batch {number}"
        if isinstance(batch, Mapping) and _TARGETS in batch:
            batch = _pair(batch)
        if not isinstance(batch, (tuple, list)):
            raise ModeconnError(
                f"{where} is of type {type(batch).__name__}; expected (inputs, targets)"
            )
        if len(batch) != 2:
            raise ModeconnError(f"{where} has {len(batch)} parts; expected two: (inputs, targets)")
        pair = as_inputs(batch[0], f"{where}: inputs"), _tensor(batch[1], f"{where}: targets")
        _check_lengths(*pair, where)
        found = tuple(map(_row_kind, pair))
        expected = expected or found
        for name, this, that in zip(("inputs", "targets"), found, expected, strict=True):
            if this != that:
                raise ModeconnError(
                    f"{where}: rows of {name} are {this}; expected {that}, as in batch 0"
                )
        yield pair


def _regrouped(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same rows in batches of `size`; views of the given batches where they need no joining."""
    held: list[Batch] = []
    count = 0
    for inputs, targets in batches:
        start = 0
        while start < len(targets):
            stop = min(start + size - count, len(targets))
            held.append((take(inputs, start, stop), targets[start:stop]))
            count += stop - start
            start = stop
            if count == size:
                yield _joined(held)
                held, count = [], 0
        if held:
            # A view would keep its whole batch in memory, and the source may fill the same buffer
            # again.
            held[-1] = apply(torch.clone, held[-1][0]), held[-1][1].clone()
    if held:
        yield _joined(held)


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return join([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])


# --------------------------------------------------------------------------------------------
# tensors


def as_inputs(value: Any, what: str) -> Inputs:
    """The value as a tensor with rows, or as a tuple or dict of them.

    Raises:
        ModeconnError: it is none of these; `what` says of which value.
    """
    if isinstance(value, Mapping) and value and all(isinstance(key, str) for key in value):
        return {key: _tensor(part, f"{what}[{key!r}]") for key, part in value.items()}
    if (
        isinstance(value, (tuple, list))
        and value
        and all(isinstance(part, (Tensor, np.ndarray)) for part in value)
    ):
        return tuple(_tensor(part, f"{what}[{i}]") for i, part in enumerate(value))
    return _tensor(value, what)


def _tensor(value: Any, what: str) -> Tensor:
    """The value as a tensor with rows, sharing memory where torch can."""
    if isinstance(value, np.ndarray):
        value = _from_numpy(value, what)
    if isinstance(value, (int, float, np.generic)) or (
        isinstance(value, Tensor) and value.ndim == 0
    ):
        raise ModeconnError(
            f"{what} is a single number; expected one row per sample "
            "(for data of single samples pass DataLoader(data, batch_size=...))"
        )
    if not isinstance(value, Tensor):
        several = ", or a tuple or dict of them" if what.endswith("inputs") else ""
        raise ModeconnError(
            f"{what} of type {type(value).__name__}; expected a tensor or numpy array{several}"
        )
    return value


def _from_numpy(array: np.ndarray, what: str) -> Tensor:
    if (
        not array.flags.writeable
        or not array.dtype.isnative
        or any(stride < 0 for stride in array.strides)
    ):
        array = array.astype(array.dtype.newbyteorder("="))  # torch takes none of these as they are
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise ModeconnError(
            f"{what}: a numpy array of dtype {array.dtype}; expected numbers that torch has"
        ) from None


def _row_kind(inputs: Inputs) -> str:
    parts = []
    for key, tensor in zip(keys(inputs), leaves(inputs)):
        name = "" if key is None else f"{key}: "
        parts.append(f"{name}{list(tensor.shape[1:])} {tensor.dtype} on {tensor.device}")
    return ", ".join(parts)


def _check_lengths(inputs: Any, targets: Tensor | np.ndarray, where: str) -> None:
    several = (
        inputs.values()
        if isinstance(inputs, Mapping)
        else inputs
        if isinstance(inputs, (tuple, list))
        else [inputs]
    )
    for part in several:
        if len(part) != len(targets):
            raise ModeconnError(
                f"{where}: {len(part):,} inputs but {len(targets):,} targets; expected one target per input"
            )


def _memory_map(array: np.ndarray) -> mmap.mmap | None:
    """The file mapping that the array reads from, if it may be released."""
    owner: Any = array
    mapped = False
    while isinstance(owner, np.ndarray):
        # In mode "c" the pages hold the user's own changes, which releasing would lose.
        mapped = mapped or (isinstance(owner, np.memmap) and owner.mode != "c")
        owner = owner.base
    return owner if mapped and isinstance(owner, mmap.mmap) else None


def _release(rows: np.ndarray, mapped: mmap.mmap) -> None:
    """Tells the system that the rows' pages have been read, so that a long file does not fill the memory.

    Without this they stay resident until memory runs short. They can be read again at any time.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):  # Windows
        return
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    start = (rows.ctypes.data - base) // mmap.PAGESIZE * mmap.PAGESIZE
    length = rows.ctypes.data - base + max(rows.strides[0], 0) * len(rows) - start
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, start, min(length, len(mapped) - start))


# ----------------------------------------------------------------------------------------------
# words


def _size(batch_size: int) -> int:
    try:
        size = operator.index(batch_size)
    except TypeError:
        raise ModeconnError(
            f"batch_size: {batch_size!r}; expected a whole number of rows"
        ) from None
    if size < 1:
        raise ModeconnError(f"batch_size: {size}; expected at least 1")
    return size


def _empty() -> ModeconnError:
    return ModeconnError("data: holds no samples; expected at least one")


def _spent() -> ModeconnError:
    return ModeconnError(
        "data: the iterator is empty; expected at least one batch, and an iterator can be read only once: "
        "give a list, a DataLoader, or (inputs, targets) to read it again"
    )
