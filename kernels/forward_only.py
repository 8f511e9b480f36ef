"""Refusal of gradients by kernels that have no backward."""

from __future__ import annotations

import torch
from torch import Tensor

from modeconn.errors import ModeconnError


def refuse_gradients(op: str, **tensors: Tensor | None) -> None:
    """Raises if autograd would record the call, rather than dropping its gradients silently.

    Raises:
        ModeconnError: a tensor requires a gradient, outside of torch.no_grad().
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ModeconnError(
                f"{name} requires a gradient, which {op} does not compute: detach it, "
                f"or use {op}_reference"
            )
