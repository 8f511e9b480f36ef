"""Outputs of a planned program at its points, gathered from blocks of rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.backends.base import Backend
from modeconn.data.inputs import Inputs, rows, take
from modeconn.plan.program import Program


def outputs_at_points(program: Program, engine: Backend, inputs: Inputs, budget: int) -> Any:
    """Return the network's outputs at the distinct points of a program.

    Args:
        engine: runs the program.
        inputs: of the dtype and on the device of the computation.
        budget: bytes for what is shared between points.

    Returns:
        A tensor [T, B, …]; of a network that returns several their structure, filled with such.
    """
    count = rows(inputs)
    most = count if program.graph.mixes_rows else engine.most_rows(budget)
    starts = range(0, count, most)
    parts = [_outputs(program, engine, take(inputs, i, i + most)) for i in starts]
    if len(parts) == 1:
        return parts[0]
    return by_leaf(partial(torch.cat, dim=1), parts)


def _outputs(program: Program, engine: Backend, x: Inputs) -> Any:
    count = rows(x)
    values = engine.shared(x)
    points: list[list[Any]] = [[] for _ in program.points]
    result: Tensor | None = None
    for segment in program.segments:
        for point, block, output in engine.all_outputs(segment, values, count):
            row = segment.point_indices[point]
            # written into a common tensor, gradients would be copied T times
            if torch.is_grad_enabled() or not isinstance(output, Tensor):
                points[row].append(output)
                continue
            if result is None:
                result = output.new_empty((len(program.points), count, *output.shape[1:]))
            result[row, block] = output
    if result is not None:
        return result
    return by_leaf(torch.stack, [by_leaf(torch.cat, blocks) for blocks in points])


def by_leaf(join: Callable[..., Tensor], parts: list[Any]) -> Any:
    """Join tensors of equal structures, one by one; what else they hold is that of the first."""
    flat = [pytree.tree_flatten(part) for part in parts]
    columns = zip(*(leaves for leaves, _ in flat))
    joined = [
        join(list(column)) if isinstance(column[0], Tensor) else column[0] for column in columns
    ]
    return pytree.tree_unflatten(joined, flat[0][1])
