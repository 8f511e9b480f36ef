"""Comparison of the native backend with plain PyTorch, and data for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import modeconn as mc
from naive import pass_per_point
from policy import assert_within_policy

Y = torch.arange(130) % 10


def agrees(
    model: nn.Module, path: object, x: Tensor, y: Tensor, points: object, precision: str = "float32"
) -> None:
    got = mc.evaluate(model, path, (x, y), points, backend="native", precision=precision)
    dtype = getattr(torch, precision)
    plain, exact = (pass_per_point(model, path, x, y, got.t, d) for d in (dtype, torch.float64))
    for name in ("loss", "error"):
        assert_within_policy(name, got.values[name], plain[name], exact[name], dtype)
    assert got.backend == "native"
