"""Networks that are written for batches of one size, such as with a state that has its rows.

They run on as many rows as they take: more are cut into such batches, and fewer filled up with
copies of the last row, whose outputs are dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from modeconn.errors import ModeconnError


def in_batches(module: nn.Module, size: int) -> Callable[..., Any]:
    """Return the forward of a module that takes `size` rows as one that takes any number."""
    forward = module.forward

    @functools.wraps(forward)
    def batched(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        count = next((len(leaf) for leaf in flat if isinstance(leaf, Tensor)), size)
        if count == size:
            return forward(*args, **kwargs)
        if count % size and any(each.training for each in module.modules()):
            raise ModeconnError(
                f"{count} rows are no multiple of {size}, which the model takes at a time: "
                "expected whole batches where norms' statistics are recomputed"
            )
        outputs = []
        for part in _parts(flat, count, size):
            own, named = pytree.tree_unflatten(part, spec)
            outputs.append(forward(*own, **named))
        return joined(outputs, count, size)

    return batched


def _parts(flat: Sequence[Any], count: int, size: int) -> Iterator[list[Any]]:
    """Yield the tensors' rows in batches, the last one filled up."""
    for start in range(0, count, size):
        index = torch.arange(start, start + size).clamp(max=count - 1)
        yield [
            leaf.index_select(0, index.to(leaf.device)) if isinstance(leaf, Tensor) else leaf
            for leaf in flat
        ]


def joined(outputs: Sequence[Any], count: int, size: int) -> Any:
    """Join what a network returned for batches, without the rows that filled up the last one.

    Args:
        outputs: of each batch, nests of tensors with the rows on the first axis, or the second.
        count: rows in all.
        size: rows of a batch.
    """
    flat = [pytree.tree_flatten(output) for output in outputs]
    by_leaf = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [_joined(parts, count, size) for parts in by_leaf]
    return pytree.tree_unflatten(leaves, flat[0][1])


def _joined(parts: Sequence[Any], count: int, size: int) -> Any:
    first = parts[0]
    if not isinstance(first, Tensor):
        return first
    # by layer, a recurrent network's states have their rows on axis 1
    axis = next((i for i, length in enumerate(first.shape[:2]) if length == size), None)
    if axis is not None:
        return torch.cat(list(parts), axis).narrow(axis, 0, count)
    if size == 1:  # squeezed: a lone row has no axis
        return torch.stack(list(parts))
    return first
