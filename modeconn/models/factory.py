"""Factories imported from the user's own code."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from modeconn.errors import ModeconnError


def call_factory(spec: str) -> nn.Module:
    """Call the function or class that ``"package.module:factory"`` names, without arguments."""
    module_name, _, attribute = spec.partition(":")
    with _current_folder_first():
        try:
            factory: object = importlib.import_module(module_name)
            for part in attribute.split("."):
                factory = getattr(factory, part)
        except Exception as error:  # importing runs the user's code, which can raise anything
            raise ModeconnError(
                f"model {spec!r} cannot be imported: {_first_line(error)}"
            ) from error
        if not callable(factory):
            kind = type(factory).__name__
            raise ModeconnError(
                f"model {spec!r} is {kind}: expected a function or class that makes a module"
            )
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise ModeconnError(
                f"model {spec!r} is called without arguments, but: {error}"
            ) from error
        except ValueError:
            pass  # some callables of C have no signature to look at
        try:
            model = factory()
        except Exception as error:
            raise ModeconnError(f"model {spec!r} failed: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModeconnError(
            f"model {spec!r} returned {type(model).__name__}: expected a torch.nn.Module"
        )
    return model


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Let imports see the current folder, as `python -m` does and an installed command does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
