"""Finds what of a process does not survive fork(), and makes locks that do.

A forked process has the thread that forked and no other. A lock that another one held would never
be free again, so locks are new there. PyTorch's pool of threads is gone, too, but its library waits
for it for ever; and what another thread was exporting has left PyTorch's globals half-way. Both are
said in one line before anything is computed.
"""

from __future__ import annotations

import os
import threading
import weakref
from pathlib import Path
from types import TracebackType

import torch

from modeconn.errors import ModeconnError

_LOCKS: weakref.WeakSet[Lock] = weakref.WeakSet()
# Of the moment of the last fork: whether threads that are not Python's were there, and captures.
_had_pool = _was_held = False
# Of this process, if it was forked.
_lost_pool = _lost_capture = False
_SPAWN = 'start processes by "spawn" (multiprocessing.get_context("spawn"))'


class Lock:
    """A lock that its thread may take again, and that is free in a forked process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _LOCKS.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def held(self) -> bool:
        """Whether another thread has it."""
        free = self._lock.acquire(blocking=False)
        if free:
            self._lock.release()
        return not free

    def renew(self) -> None:
        """Free it, whoever had it."""
        self._lock = threading.RLock()


def check_fork() -> None:
    """Raise a ModeconnError where this process was forked and cannot compute."""
    if _lost_pool and torch.get_num_threads() > 1:
        raise ModeconnError(
            "this process was forked from one that had computed in several threads, which a fork "
            f"does not have: call torch.set_num_threads(1) here, or {_SPAWN}"
        )
    if _lost_capture:
        raise ModeconnError(
            "this process was forked while another thread captured a model, which cannot be "
            f"continued here: fork before or after, or {_SPAWN}"
        )


def _before() -> None:
    global _had_pool, _was_held
    _had_pool = _threads() > threading.active_count()
    _was_held = any(lock.held() for lock in _LOCKS)


def _in_child() -> None:
    global _lost_pool, _lost_capture
    _lost_pool, _lost_capture = _lost_pool or _had_pool, _lost_capture or _was_held
    for lock in _LOCKS:
        lock.renew()


def _threads() -> int:
    """The threads of this process, those that are not Python's included; 0 where nobody knows."""
    try:
        return sum(1 for _ in Path("/proc/self/task").iterdir())
    except OSError:
        return 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_child=_in_child)
