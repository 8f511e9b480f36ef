"""One form for what can be written in many ways, so that rules and backends meet each operation under one name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from modeconn.capture import ops
from modeconn.capture.graph import Dim, In, Node, Size
from modeconn.capture.opaque import closed_part, operation

Call = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def canonical(
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    nodes: Sequence[Node],
    inputs: list[int],
    shape: tuple[Dim, ...],
) -> Call:
    """Name an operation for the rules, and replace the few that would not run on every layout.

    Args:
        nodes: those before it.
        inputs: of it; changed in place where it can do without the operation just before it.
        shape: of its value.
    """
    if target is operation():
        return "module", closed_part(args[2]), args[:2], {}
    name = getattr(target, "__name__", str(target))
    packet = name.removesuffix("." + name.rsplit(".", 1)[-1]) if "." in name else name
    if packet == "_native_batch_norm_legit_no_training":
        x, weight, bias, mean, var, _, eps = args
        return "batch_norm", ops.batch_norm, (x, mean, var, weight, bias, eps), kwargs
    if packet == "linear":
        return packet, ops.linear, args, kwargs
    if packet == "rsub" and len(args) == 2 and not kwargs:
        return "sub", ops.subtract, (args[1], args[0]), {}
    before = nodes[inputs[0]] if inputs and args[0] == In(0) else None
    if before is not None and not kwargs:
        found = _of_a_value(packet, args, before, shape, nodes, inputs)
        if found is not None:
            return found
    if packet in ("view", "_unsafe_view", "reshape"):
        # A view of a channels-last value would need a copy; reshape makes it where needed.
        return "reshape", torch.ops.aten.reshape.default, args, kwargs
    return packet, target, args, kwargs


def _of_a_value(
    packet: str,
    args: tuple[Any, ...],
    before: Node,
    shape: tuple[Dim, ...],
    nodes: Sequence[Node],
    inputs: list[int],
) -> Call | None:
    flat = len(shape) == 2 and len(before.shape) > 2 and _same_rows(before.shape, shape)
    if flat and packet in ("view", "_unsafe_view", "reshape"):
        return "flatten", torch.ops.aten.flatten.using_ints, (args[0], 1), {}
    if packet == "slice" and _is_whole(args, before.shape):
        return "alias", ops.identity, (args[0],), {}
    first = (
        nodes[before.inputs[0]]
        if len(before.inputs) == 1 and before.args[:1] == (In(0),) and not before.kwargs
        else None
    )
    if (
        first is None
        or len(first.shape) != 4
        or len(shape) != 2
        or not _same_rows(first.shape, shape)
    ):
        return None
    pixel = first.shape[1:] == (shape[1], 1, 1)
    if pixel and packet in ("squeeze", "select") and before.op in ("squeeze", "select"):
        inputs[0] = first.id
        return "flatten", torch.ops.aten.flatten.using_ints, (args[0], 1), {}
    if (
        packet == "mean" == before.op
        and _axis_of(before.args, 4) in (2, 3)
        and _axis_of(args, 3) == 2
    ):
        inputs[0] = first.id
        return "mean", torch.ops.aten.mean.dim, (args[0], [2, 3]), {}
    return None


def _same_rows(before: Sequence[Dim], after: Sequence[Dim]) -> bool:
    """Whether both begin with the rows of the batch."""
    return (
        isinstance(before[0], Size)
        and isinstance(after[0], Size)
        and str(before[0]) == str(after[0])
    )


def _is_whole(args: tuple[Any, ...], shape: Sequence[Dim]) -> bool:
    """Whether a slice takes all of its axis."""
    given: list[Any] = [*args[1:], *[0, None, None, 1][len(args) - 1 :]]
    axis, start, end, step = given
    size = shape[axis]
    most = size if isinstance(size, int) else torch.iinfo(torch.int64).max
    return (
        start in (0, None) and step == 1 and (end is None or (isinstance(end, int) and end >= most))
    )


def _axis_of(args: tuple[Any, ...], axes: int) -> int | None:
    """The only axis that a mean is taken over, if it is one and is left out."""
    over = args[1] if len(args) == 2 else None
    return (
        over[0] % axes
        if isinstance(over, list) and len(over) == 1 and isinstance(over[0], int)
        else None
    )
