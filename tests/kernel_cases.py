"""Shared by the kernels' tests: blended tensors, copies in other precisions, and the comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modeconn.kernels.arguments import PathLayer
from modeconn.kernels.blended import Blended
from policy import assert_within_policy

KINDS = ("shared", "per point", "combined")


def blended(terms: int, points: int, *shape: int, scale: float = 0.5) -> Blended:
    """Random tensors with coefficients of which one is 0."""
    coefficients = torch.randn(points, terms)
    coefficients[-1:, -1] = 0 if terms > 1 else 1
    return Blended(scale * torch.randn(terms, *shape), coefficients)


def samples(kind: str, points: int, rows: int, width: int) -> Tensor | Blended:
    """An input of the samples of one of the `KINDS`."""
    if kind == "combined":
        return blended(2, points, rows, width, scale=1.0)
    return torch.randn(rows, width) if kind == "shared" else torch.randn(points, rows, width)


def leaves(value: Any) -> list[Tensor]:
    """The tensors of an argument that gradients go to."""
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, PathLayer):
        return leaves([value.weight, value.bias])
    if isinstance(value, Blended):
        return [value.tensors]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


def copied(value: Any, dtype: torch.dtype = torch.float64) -> Any:
    """An argument in another precision, detached; what is no tensor stays as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item, dtype) for item in value)
    if isinstance(value, PathLayer):
        return PathLayer(
            copied(value.weight, dtype), copied(value.bias, dtype), value.activation, value.slope
        )
    if isinstance(value, Blended):
        return Blended(copied(value.tensors, dtype), value.coefficients.to(dtype))
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().to(dtype)
    return value


def compare(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    arguments: tuple,
    **options: Any,
) -> None:
    """Compare a kernel's values and gradients with the reference's in float64, by policy.py."""
    results = []
    for function, dtype in (
        (kernel, torch.float32),
        (reference, torch.float32),
        (reference, torch.float64),
    ):
        given = [copied(argument, dtype) for argument in arguments]
        for leaf in leaves(given):
            leaf.requires_grad_()
        out = function(*given, **options)
        loss = out[:, 0] if out.shape[-1] == 3 and out.dim() == 2 else out
        torch.manual_seed(1)
        grads = torch.autograd.grad(loss, leaves(given), torch.randn(loss.shape).to(loss.dtype))
        results.append([out.detach(), *grads])
    for index, (got, plain, exact) in enumerate(zip(*results)):
        assert_within_policy(
            "values" if index == 0 else f"gradient {index}", got, plain, exact, torch.float32
        )
