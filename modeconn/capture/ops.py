"""Operations that replace those of torch.export, to run on every memory layout or to be faster.

Their parameters have the names that PyTorch gives them: rules and backends read arguments by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Measured: a convolution of fewer rows than this does not make up for preparing its weights.
_FEW_ROWS = 64
# Bytes of an unfolded image or several that stay in a core's cache.
_UNFOLDED_BYTES = 1 << 20


def placeholder() -> None:
    """Stands for an input of the network, whose value is given."""


def element(values: Any, index: int) -> Any:
    """values[index]: one of the tensors that an operation returns."""
    return values[index]


def subtract(self: Any, other: Any) -> Any:
    """self - other, where the first may be a number."""
    return self - other


def batch_norm(
    input: Tensor,  # noqa: A002
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Batch norm with given statistics."""
    return F.batch_norm(input, mean, var, weight, bias, training=False, eps=eps)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """Linear layer [N, in] → [N, out], by the faster of PyTorch's two matrix products here.

    PyTorch's CPU builds multiply matrices with MKL, which keeps to AVX2 on processors of other
    makers, and convolve with oneDNN, which takes AVX-512 wherever it is: there a 1×1 convolution is
    the same sum at twice the speed.
    """
    if (
        input.dim() != 2
        or len(input) < _FEW_ROWS
        or input.dtype != torch.float32
        or input.device.type != "cpu"
        or not mkl_falls_behind()
    ):
        return F.linear(input, weight, bias)
    image = input.contiguous()[None, None].permute(0, 3, 1, 2)  # channels last, one row of pixels
    return F.conv2d(image, weight[:, :, None, None], bias)[0, :, 0].t()


def conv2d(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution of images, in float64 by few of them at a time.

    PyTorch's CPU builds have no kernel for float64: they unfold all images of a batch into one
    matrix, which has to be paged in each time, and multiply. Where it fits the cache this takes a
    quarter of the time.
    """
    own = (weight, bias, stride, padding, dilation, groups)
    if input.dtype != torch.float64 or input.device.type != "cpu" or input.dim() != 4:
        return torch.conv2d(input, *own)
    of_an_image = math.prod(input.shape[1:]) * weight[0, 0].numel() * input.element_size()
    # Images are spread over threads, each with a matrix of its own.
    together = torch.get_num_threads() * max(1, _UNFOLDED_BYTES // max(1, of_an_image))
    if len(input) <= together:
        return torch.conv2d(input, *own)
    return torch.cat([torch.conv2d(part, *own) for part in input.split(together)])


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
