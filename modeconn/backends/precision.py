"""Precision of PyTorch's own operations: as requested, whatever its defaults and modes are."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from modeconn.parameters.forking import check_fork

Given = ParamSpec("Given")
Made = TypeVar("Made")


def without_autocast(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Decorates a function to run with autocast off: its precision is an argument, not a mode.

    In a forked process that cannot compute it says so (parameters/forking.py), where it would wait.

    A decorator of this package's own, since warnings look for the first line outside of it.
    """

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        check_fork()
        with contextlib.ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Sets how PyTorch multiplies and convolves float32 tensors within it.

    By default PyTorch convolves in TF32 on a CUDA device. Here it does so for "tf32" and "bf16"
    alone, and multiplies in TF32, too; "bf16" itself is for the kernels.
    """
    if device.type != "cuda":
        yield
        return
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if precision in ("tf32", "bf16") else "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value
