"""Precision of PyTorch's own products on a CUDA device: as requested, whatever its defaults are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


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
