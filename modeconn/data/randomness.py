"""Random states, put back after work that a user's function does not know of."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor


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
