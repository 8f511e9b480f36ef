"""Failures on purpose: the n-th allocation, write, fsync, rename, call of the engine, or data item.

An operation is run again and again, with the first, second, third … of its steps of one kind
failing, until it succeeds because it has fewer. After each failure everything must be as before,
and the same operation must then finish.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeconn.backends.native import extension as native
from modeconn.files.writing import is_temporary

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
BROKEN = OSError(errno.EIO, os.strerror(errno.EIO))
MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes"


class Fault:
    """Makes the n-th step fail."""

    def __init__(self, number: int) -> None:
        self.number, self.steps = number, 0

    def step(self, error: BaseException) -> None:
        self.steps += 1
        if self.steps == self.number:
            raise type(error)(*error.args)  # one of its own, without the traces of others

    @property
    def fired(self) -> bool:
        return self.steps >= self.number


class _Allocations(TorchDispatchMode):
    """Every operation of PyTorch allocates what it returns."""

    def __init__(self, fault: Fault) -> None:
        super().__init__()
        self.fault = fault

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.fault.step(RuntimeError(MEMORY))
        return function(*args, **(kwargs or {}))


class _Stream:
    """A file of which the n-th write fails, when some of it is written."""

    def __init__(self, stream: Any, fault: Fault) -> None:
        self._stream, self._fault = stream, fault

    def write(self, content: Any) -> int:
        half = memoryview(content).cast("B")[: len(content) // 2]
        with contextlib.suppress(OSError):
            self._fault.step(FULL)
            return self._stream.write(content)
        self._stream.write(half)
        raise FULL

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


class _Engine:
    """The extension, of which the n-th call fails."""

    def __init__(self, fault: Fault, module: Any) -> None:
        self._fault, self._module = fault, module

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self._fault.step(MemoryError("std::bad_alloc"))
            return getattr(self._module, name)(*args, **options)

        return call


class Rows(torch.utils.data.Dataset):
    """A dataset of which the n-th item fails, while there is a fault."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y
        self.fault: Fault | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fault is not None:
            self.fault.step(BROKEN)
        return self.x[i], self.y[i]


@contextlib.contextmanager
def failing(kind: str, number: int, data: Rows | None = None) -> Iterator[Fault]:
    """Within, the n-th step of a kind fails."""
    fault = Fault(number)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if kind == "allocation":
            stack.enter_context(_Allocations(fault))
        elif kind == "write":
            opened = Path.open

            def failing_open(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
                stream = opened(self, mode, *args, **options)
                return _Stream(stream, fault) if set(mode) & set("wxa+") else stream

            patch.setattr(Path, "open", failing_open)
        elif kind == "launch":
            engine = _Engine(fault, native.extension())
            patch.setattr(native, "extension", lambda: engine)
        elif kind == "item":
            assert data is not None
            patch.setattr(data, "fault", fault)
        else:
            places = {"fsync": [(os, "fsync")], "rename": [(Path, "replace"), (Path, "rename")]}
            places |= {"open": [(Path, "open")], "mkdir": [(Path, "mkdir")]}
            for owner, name in places[kind]:
                patch.setattr(owner, name, _stepping(fault, getattr(owner, name)))
        yield fault


def _stepping(fault: Fault, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        fault.step(BROKEN)
        return function(*args, **options)

    return call


def contents(folder: Path) -> dict[str, bytes]:
    """Every file in a folder and below."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Survival:
    """Runs an operation with a failure at every place, and without one after each.

    Args:
        operation: works in a folder.
        errors: what it may raise when a step fails; anything else fails the test.
        whole: checks a file that the operation wrote anew, given its path.
        leftovers: names of what may stay behind a failure, for the next call to go on from.
        same: returns what must not change, and must be the same in the end.
        limit: places tried; beyond, those between the first and the last of them evenly.
    """

    def __init__(
        self,
        operation: Callable[[Path], Any],
        errors: tuple[type[BaseException], ...],
        whole: Callable[[Path], object],
        leftovers: tuple[str, ...] = (),
        same: Callable[[], object] = lambda: None,
        limit: int = 10**6,
    ) -> None:
        self.operation, self.errors, self.whole = operation, errors, whole
        self.leftovers, self.same, self.limit = leftovers, same, limit

    def of(self, kind: str, template: Path, scratch: Path, data: Rows | None = None) -> int:
        """Returns how many places failed, each of which it survived."""
        self.operation(self._folder(template, scratch, "first"))  # graphs are captured once
        with failing(kind, 10**9, data) as counting:
            self.operation(self._folder(template, scratch, "count"))
        places = range(1, counting.steps + 1)
        if len(places) > self.limit:
            places = sorted(
                {1 + i * (len(places) - 1) // (self.limit - 1) for i in range(self.limit)}
            )
        for number in places:
            self._at(kind, number, self._folder(template, scratch, str(number)), template, data)
        return counting.steps

    def _at(self, kind: str, number: int, folder: Path, template: Path, data: Rows | None) -> None:
        where, same, before = f"{kind} {number}", self.same(), contents(template)
        said = ""
        with failing(kind, number, data) as fault:
            try:
                self.operation(folder)
            except self.errors as error:
                said = str(error)
        assert fault.fired, f"{where}: other steps in each run"
        assert len(said.splitlines()) <= 1, f"{where}: {said}"
        assert self.same() == same, f"{where}: something of the user's has changed"
        after = contents(folder)
        for name in {**before, **after}:
            if name.startswith(self.leftovers or ("\0",)):
                continue
            assert name in after, f"{where}: {name} is gone"
            assert not is_temporary(Path(name)), f"{where}: {name} is left behind"
            if after[name] != before.get(name):
                self.whole(folder / name)
        self.operation(folder)
        assert self.same() == same, f"{where}: something of the user's has changed afterwards"
        left = [path for path in folder.rglob("*") if is_temporary(path)]
        assert not left, f"{where}: {left} stay for ever"
        for name in contents(folder):
            if not name.startswith(self.leftovers or ("\0",)):
                self.whole(folder / name)
        shutil.rmtree(folder)

    def _folder(self, template: Path, scratch: Path, name: str) -> Path:
        return Path(shutil.copytree(template, scratch / f"{name}-{next(_NUMBERS)}"))


_NUMBERS = itertools.count()
