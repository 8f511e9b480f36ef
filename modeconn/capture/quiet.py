"""Keeps torch.export quiet, one export at a time: what stops it is reported in one line instead.

torch.export keeps the state of an export in globals, warns of its own code, logs, and prints what
it has of a graph to stderr when it fails. Streams stay as they are, since other threads write to
them: what prints and logs is told to leave out what the exporting thread says.
"""

from __future__ import annotations

import builtins
import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from modeconn.parameters.forking import Lock

_ONE_AT_A_TIME = Lock()
_THREAD = threading.local()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within, this thread's exports say nothing; other threads wait with theirs."""
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = getattr(_THREAD, "quiet", False)
        _THREAD.quiet = True
        try:
            yield
        finally:
            _THREAD.quiet = before


class _Others(logging.Filter):
    """Lets pass what threads log that are not exporting."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_THREAD, "quiet", False)


def _print(*values: Any, **options: Any) -> None:
    if not getattr(_THREAD, "quiet", False):
        builtins.print(*values, **options)


@functools.cache
def silence_export() -> None:
    """Teach the two modules that print, and the handlers that log, to ask who is speaking.

    It loads torch.export, which takes seconds: it is called where something is exported.
    """
    import torch.export._trace
    import torch.fx.graph_module

    for module in (torch.export._trace, torch.fx.graph_module):
        vars(module)["print"] = _print
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            for handler in logger.handlers:
                handler.addFilter(_Others())
