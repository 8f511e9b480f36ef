"""The few operations that run otherwise than torch.export wrote them, for every layout or for speed."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Fewer rows than this do not make up for preparing the weights.
_FEW_ROWS = 64


def identity(x: Any) -> Any:
    """The input."""
    return x


def subtract(input: Any, other: Any) -> Any:  # noqa: A002  # the name that PyTorch gives it
    """input - other, where the first may be a number."""
    return input - other


def batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm with given statistics."""
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer [N, in] → [N, out], by the faster of PyTorch's two matrix products on this CPU.

    PyTorch's CPU builds multiply matrices with MKL, which keeps to AVX2 on processors of other
    makers, and convolve with oneDNN, which takes AVX-512 wherever it is: there a 1×1 convolution is
    the same sum at twice the speed.
    """
    if (
        x.dim() != 2
        or len(x) < _FEW_ROWS
        or x.dtype != torch.float32
        or x.device.type != "cpu"
        or not mkl_falls_behind()
    ):
        return F.linear(x, weight, bias)
    image = x.contiguous()[None, None].permute(0, 3, 1, 2)  # channels last, one row of pixels
    return F.conv2d(image, weight[:, :, None, None], bias)[0, :, 0].t()


@functools.cache
def mkl_falls_behind() -> bool:
    """Whether MKL leaves out instructions that this CPU has and oneDNN uses."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not (
        torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    ):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(errors="replace")


class Take:
    """Some indices along some axes of a value.

    Args:
        along: the indices by axis, in rising order.
    """

    def __init__(self, along: Mapping[int, np.ndarray]) -> None:
        self.along = dict(along)
        self._index = {axis: torch.from_numpy(index) for axis, index in along.items()}

    def __call__(self, x: Tensor) -> Tensor:
        """The part of x; a view of it where the indices follow each other."""
        for axis, index in self._index.items():
            first, count = int(index[0]), len(index)
            if int(index[-1]) - first + 1 == count:
                x = x.narrow(axis, first, count)
            else:
                x = x.index_select(axis, index.to(x.device))
        return x
