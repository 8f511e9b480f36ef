"""How exactly PyTorch multiplies on a CUDA device: as the `precision` that was asked for says, whatever its defaults are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Within it, PyTorch's float32 products and convolutions are true ones, or of TF32 where "tf32" or "bf16" was asked for.

    By default PyTorch convolves in TF32 on a CUDA device. "bf16" is that of the kernels; what
    PyTorch does is then TF32.
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
