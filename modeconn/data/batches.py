"""The user's data as batches: from any source, in its own order, never loaded whole."""

from __future__ import annotations

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
from modeconn.data.inputs import Inputs, apply, join, take
from modeconn.data.inputs import rows as rows_of
from modeconn.data.randomness import watched
from modeconn.data.tensors import as_inputs, as_tensor, check_lengths, each, row_kind, slice_rows
from modeconn.errors import ModeconnError, warn

# `Inputs` [B, ...], a tensor or several as a tuple or dict, and targets [B, ...].
Batch = tuple[Any, Tensor]

_ACCEPTED = (
    "(inputs, targets) as tensors or arrays, a torch Dataset or DataLoader, "
    "or an iterable of (inputs, targets) batches; texts that are their own labels are given twice, "
    "(texts, texts)"
)
# The key of the targets where inputs and targets come in one dict; where it is missing, the one of
# these that is there.
TARGETS = "labels"
_OTHER_TARGETS = ("label", "targets", "target")


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
        rows: Callable[[int, int], Any] | None = None,
    ) -> None:
        """Make batches of a source; `as_batches` does so for all kinds of data.

        Args:
            read: Begins a pass over the source's own (inputs, targets) batches.
            batch_size: Rows in each batch, at least 1.
            samples: Rows in a pass, where known.
            once: Whether the source is spent after one pass.
            rows: Reads rows from one up to another, where that can be done without those before.

        Raises:
            ModeconnError: `samples` is 0.
        """
        if samples == 0:
            raise _empty()
        self.batch_size = batch_size
        self.samples = samples
        self.passes = 0
        self._read = read
        self._once, self._rows = once, rows
        self._counted: int | None = None  # rows in the first complete pass
        self._drawn: tuple[Callable[[], None], int] | None = None

    def watch(self, drawn: Callable[[], None], skip: int) -> None:
        """Call a function in each pass whose first batches draw random numbers when they are read.

        Args:
            drawn: the function.
            skip: batches of the source before the first that is watched.
        """
        self._drawn = drawn, skip

    def __iter__(self) -> Iterator[Batch]:
        if self._once and self.passes:
            raise ModeconnError(
                "data: an iterator can be read only once, and this is a second pass; expected "
                "something that can be read again: a list, a DataLoader, or (inputs, targets)"
            )
        self.passes += 1
        return self._pass(self.passes)

    def share(self, rank: int, size: int) -> Iterator[tuple[int, Batch]]:
        """Yield the first batch, and one in so many, each with its number, in a pass.

        Other batches are not read where rows can be read without those before them.

        Args:
            rank: number of the first of those batches.
            size: how many numbers they are apart.
        """
        if self._rows is None or self.samples is None:
            for number, batch in enumerate(self):
                if number == 0 or number % size == rank:
                    yield number, batch
            return
        self.passes += 1
        step, total, read = self.batch_size, self.samples, self._rows
        count = -(-total // step)
        numbers = [0, *range(rank or size, count, size)]
        parts = (read(n * step, min((n + 1) * step, total)) for n in numbers)
        yield from zip(numbers, _checked(parts))

    def _pass(self, number: int) -> Iterator[Batch]:
        seen, source = 0, self._read()
        if self._drawn is not None:
            source = watched(source, *self._drawn)
        for batch in _regrouped(_checked(source), self.batch_size):
            seen += len(batch[0])
            yield batch
        if self._counted not in (None, seen):
            raise ModeconnError(
                f"data: pass {number} gave {seen:,} samples, the first {self._counted:,}; expected "
                "the same in every pass (can the source be read only once, or does it change?)"
            )
        if seen == 0:
            raise _spent() if self._once else _empty()
        self._counted = self.samples = seen


def as_batches(data: Any, batch_size: int) -> Batches:
    """Return data as batches of `batch_size` rows, in the source's own order.

    Nothing is shuffled here, and a DataLoader is used as it is: one that shuffles gives another
    order in each pass, one with drop_last=True leaves its last rows out; its own batch size makes
    no difference.

    Args:
        data: (inputs, targets) as tensors, arrays or memory maps [N, ...], read slice by slice;
            `Images`; a torch Dataset of (inputs, target) samples, joined by torch's
            default_collate; a DataLoader or any other iterable of (inputs, targets) batches. An
            iterator (a generator, say) serves for one pass. `Batches` are returned as they are,
            whatever `batch_size` says. Where a network takes several inputs they are a tuple or a
            dict; inputs and targets may also be one dict, with the targets as "labels" ("label",
            "targets" or "target" where there is no such key).
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
        return _sliced(data.slice, len(data), size)
    if is_batch(data):
        data = _pair(data, "data")
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
    if isinstance(data, Mapping):
        raise without_targets(data, "data")
    readable = hasattr(data, "__iter__") or hasattr(data, "__getitem__")
    if isinstance(data, (Tensor, np.ndarray)) or not readable:
        raise ModeconnError(f"data: of type {type(data).__name__}; expected {_ACCEPTED}")
    if isinstance(data, (tuple, list)) and not data:
        raise _empty()
    return Batches(partial(iter, data), size, once=isinstance(data, Iterator))


def first_rows(data: Any, most: int, batch_size: int) -> Iterator[Inputs]:
    """Yield the inputs of the first `most` rows of data that are read again, batch by batch.

    Raises:
        ModeconnError: the data are an iterator; else as for `Batches`.
    """
    if isinstance(data, Iterator):
        raise ModeconnError(
            "data is an iterator, which serves for one pass: expected data that can be read again: "
            "a list, a DataLoader, or (inputs, targets)"
        )
    for inputs, _ in as_batches(data, batch_size):
        x = take(inputs, 0, most)
        yield x
        most -= rows_of(x)
        if most <= 0:
            return


def _from_arrays(parts: Sequence[Any], size: int) -> Batches:
    if len(parts) != 2:
        raise ModeconnError(
            f"data: got {len(parts)} tensors or arrays; expected two: (inputs, targets)"
        )
    inputs, targets = parts
    as_inputs(each(_first_row, inputs), "data: inputs")
    as_tensor(_first_row(targets), "data: targets")
    check_lengths(inputs, targets, "data")
    return _sliced(partial(slice_rows, inputs, targets), len(targets), size)


def _sliced(rows: Callable[[int, int], Batch], total: int, size: int) -> Batches:
    return Batches(partial(_slices, rows, total, size), size, samples=total, rows=rows)


def is_batch(data: Any) -> bool:
    """Whether data are one dict of inputs and targets, and not several data sets by name."""
    key = _targets_key(data) if isinstance(data, Mapping) else None
    return key == TARGETS or (key is not None and isinstance(data[key], (Tensor, np.ndarray)))


def _targets_key(batch: Mapping[str, Any]) -> str | None:
    """Return the key of the targets in one dict; None where none, or more than one, could be it."""
    if TARGETS in batch:
        return TARGETS
    found = [key for key in _OTHER_TARGETS if key in batch]
    return found[0] if len(found) == 1 else None


def without_targets(batch: Mapping[Any, Any], where: str) -> ModeconnError:
    """Return the error for a dict in which no key, or more than one, could be that of targets."""
    keys, others = (", ".join(map(repr, each)) for each in (batch, _OTHER_TARGETS))
    return ModeconnError(
        f"{where}: has the keys {keys}; targets are expected as "
        f"{TARGETS!r}, or as one of {others}, and all other keys are inputs of forward: rename the "
        "key, or give (inputs, targets)"
    )


def _pair(batch: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Any]:
    """Split one dict into inputs and targets."""
    targets = _targets_key(batch)
    if targets is None:
        raise without_targets(batch, where)
    return {key: value for key, value in batch.items() if key != targets}, batch[targets]


def _slices(rows: Callable[[int, int], Batch], total: int, size: int) -> Iterator[Batch]:
    for start in range(0, total, size):
        yield rows(start, min(start + size, total))


def _from_dataset(dataset: Dataset[Any], size: int) -> Batches:
    if isinstance(dataset, IterableDataset):
        return Batches(partial(_collated, dataset, size), size)
    if not hasattr(dataset, "__len__"):
        kind = type(dataset).__name__
        raise ModeconnError(
            f"data: {kind} has no length; expected a Dataset with __len__, or IterableDataset"
        )
    total = len(dataset)

    def rows(start: int, stop: int) -> Any:
        return _collate([dataset[i] for i in range(start, stop)])

    return Batches(
        lambda: _collated((dataset[i] for i in range(total)), size), size, samples=total, rows=rows
    )


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
            "data: the dataset's samples cannot be joined to a batch: "
            f"{str(error).splitlines()[0]}; expected tensors, arrays or numbers of equal shape "
            "(images need a transform to tensors)"
        ) from error


def _loader_samples(loader: DataLoader[Any]) -> int | None:
    """Count the rows in a pass, where the loader's own parts tell."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None
    try:
        total = len(loader.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    if not loader.drop_last:
        return total
    left_out = total % loader.batch_size
    if 0 < left_out < total:
        warn(
            f"the DataLoader leaves out the last {left_out:,} of {total:,} samples "
            "(drop_last=True), and results are means over the others: give one with drop_last=False"
        )
    return total - left_out


def _first_row(part: Any) -> Any:
    return part[:1] if isinstance(part, (Tensor, np.ndarray)) and part.ndim else part


def _checked(batches: Iterable[Any]) -> Iterator[Batch]:
    """Yield the source's batches as pairs of tensors that fit together."""
    expected: tuple[str, ...] | None = None
    for number, batch in enumerate(batches):
        where = f"data: batch {number}"
        if isinstance(batch, Mapping):
            batch = _pair(batch, where)
        if not isinstance(batch, (tuple, list)):
            raise ModeconnError(
                f"{where} is of type {type(batch).__name__}; expected (inputs, targets)"
            )
        if len(batch) != 2:
            raise ModeconnError(f"{where} has {len(batch)} parts; expected two: (inputs, targets)")
        pair = as_inputs(batch[0], f"{where}: inputs"), as_tensor(batch[1], f"{where}: targets")
        check_lengths(*pair, where)
        found = tuple(map(row_kind, pair))
        expected = expected or found
        for name, this, that in zip(("inputs", "targets"), found, expected, strict=True):
            if this != that:
                raise ModeconnError(
                    f"{where}: rows of {name} are {this}; expected {that}, as in batch 0"
                )
        yield pair


def _regrouped(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Yield the rows in batches of `size`: views where the given batches need no joining."""
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
        "data: the iterator is empty; expected at least one batch, and an iterator can be read "
        "only once: give a list, a DataLoader, or (inputs, targets) to read it again"
    )
