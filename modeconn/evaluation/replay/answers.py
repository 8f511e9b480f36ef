"""Answers that lead to gradients: the forward runs only where one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def lazily(again: Callable[[], Any], value: Any, leaves: Sequence[Tensor]) -> Any:
    """Return a value that stands for a function's output, gradients included.

    Args:
        again: computes the output, differentiably in the leaves.
        value: its tensors are those of the output, in the output's structure.
        leaves: tensors that require gradients, which the output depends on.
    """
    flat, spec = pytree.tree_flatten(value)
    places = [i for i, leaf in enumerate(flat) if _differentiable(leaf)]

    def chosen() -> list[Tensor]:
        output = pytree.tree_leaves(again())
        return [output[i] for i in places]

    made = _Answer.apply(chosen, [flat[i] for i in places], *leaves)
    for place, tensor in zip(places, made):
        flat[place] = tensor
    return pytree.tree_unflatten(flat, spec)


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class _Answer(torch.autograd.Function):
    """Tensors that are known, with the gradients of what computes them."""

    @staticmethod
    def forward(
        ctx: Any, chosen: Callable[[], list[Tensor]], values: list[Tensor], *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the values."""
        ctx.chosen = chosen
        ctx.save_for_backward(*leaves)
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Compute them after all, and their gradients, differentiably where that is asked for."""
        leaves = ctx.saved_tensors
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            outputs = ctx.chosen()
        needed = [leaf for leaf, needs in zip(leaves, ctx.needs_input_grad[2:]) if needs]
        pairs = [(o, g) for o, g in zip(outputs, gradients) if o.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in pairs],
            needed,
            [gradient for _, gradient in pairs],
            allow_unused=True,
            create_graph=further,
        )
        given = iter(found)
        return (None, None, *(next(given) if n else None for n in ctx.needs_input_grad[2:]))
