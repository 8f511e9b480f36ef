"""Random states, put back after work that a user's function does not know of."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")
# Batches that are looked at: what draws for one sample draws for all, or for one in a few.
_WATCHED = 4


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """Within, whatever is drawn leaves no trace: Python's, NumPy's and PyTorch's states come back.

    The global generators are meant, on the CPU and on every CUDA device in use.
    """
    restore = restorer()
    try:
        yield
    finally:
        restore()


def restorer() -> Callable[[], None]:
    """Return what sets the global generators back to their present states."""
    states = random.getstate(), np.random.get_state(), torch_states()  # noqa: NPY002

    def restore() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        _set_torch_states(states[2])

    return restore


def watched(batches: Iterable[T], drawn: Callable[[], None], skip: int) -> Iterator[T]:
    """Yield batches, and tell once if reading one of the first draws from a global generator.

    Args:
        batches: in the order in which they are read, one at a time.
        drawn: called if one draws.
        skip: batches before the first that is watched.
    """
    source, watching = iter(batches), True
    for number in itertools.count():
        watching &= number < skip + _WATCHED
        before = _all_states() if watching and number >= skip else None
        try:
            batch = next(source)
        except StopIteration:
            return
        if before is not None and not _equal(before, _all_states()):
            watching = False
            drawn()
        yield batch


def _all_states() -> list[Any]:
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), numpy[1].tobytes(), numpy[2:], *torch_states()]


def _equal(one: list[Any], other: list[Any]) -> bool:
    pairs = zip(one, other)
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs
    )


def torch_states() -> list[Tensor]:
    """Return the states of PyTorch's generators: of the CPU, and of CUDA devices once in use."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def has_drawn(before: list[Tensor]) -> bool:
    """Whether a generator of PyTorch's has moved on from these states."""
    now = torch_states()
    return len(now) != len(before) or not all(map(torch.equal, now, before))


def _set_torch_states(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
