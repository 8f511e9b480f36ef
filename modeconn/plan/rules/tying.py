"""Ties axes: operations work index by index along some, and mix along others.

Each function ties the axes of a node's inputs and entries and returns those of its value; the
table of rules (plan/rules/table.py) has each beside the operation's liveness and linearity.
"""

from __future__ import annotations

from collections.abc import Sequence

from modeconn.capture.graph import Entry, In, Node, Size
from modeconn.errors import Unsupported
from modeconn.plan.rules.axes import ROWS, Atom, Axis, Sum, Uniform, product, resolve, tie
from modeconn.plan.rules.base import Axes, freeze_axes, own_axes


def elementwise(node: Node, axes: Axes) -> list[Axis]:
    """Operations on each number, with axes of size one broadcast."""
    tensors = axes.operands(node)
    if len(tensors) == 1 and len(tensors[0]) == len(node.shape):
        return tensors[0]
    return broadcast_axes(tensors, len(node.shape))


def broadcast_axes(tensors: Sequence[Sequence[Axis]], rank: int) -> list[Axis]:
    """Tie the axes of tensors, counted from the last."""
    value: list[Axis] = [Uniform(1)] * rank
    for tensor in tensors:
        for place, axis in enumerate(tensor, rank - len(tensor)):
            if value[place].size == 1:
                value[place] = axis
            elif axis.size != 1:
                value[place] = tie(value[place], axis)
    return value


def expanded(node: Node, axes: Axes) -> list[Axis]:
    """expand: copies along an axis are equal."""
    (given,) = axes.operands(node)
    sizes = [size.of(ROWS) if isinstance(size, Size) else size for size in node.shape]
    missing = len(sizes) - len(given)
    value: list[Axis] = [Uniform(size) for size in sizes[:missing]]
    for axis, size in zip(given, sizes[missing:]):
        value.append(axis if axis.size == size else Uniform(size))
    return value


def uniform(node: Node, axes: Axes) -> list[Axis]:
    """zeros, ones, full: equal along every axis."""
    return [Uniform(s.of(ROWS) if isinstance(s, Size) else s) for s in node.shape]


def by_channel(node: Node, axes: Axes) -> list[Axis]:
    """Batch norm, prelu: tensors of one number for each channel (axis 1)."""
    given, *others = axes.operands(node)
    for (other,) in others:
        if other.size > 1:
            given[1] = tie(given[1], other)
    return given


def over_pixels(node: Node, axes: Axes) -> list[Axis]:
    """Pooling and resizing: channel by channel, and not by any permutation of pixels."""
    (given,) = axes.operands(node)
    if len(given) != len(node.shape) or len(given) < 3:
        raise Unsupported("expected samples, channels and pixels")
    freeze_axes(node, given[2:], "neighbouring pixels")
    return [*given[:2], *own_axes(node, f"{node.op}: neighbouring pixels")[2:]]


def over_last(node: Node, axes: Axes) -> list[Axis]:
    """Layer norm: over some of the last axes, in whatever order their indices are."""
    given, *others = axes.operands(node)
    first = len(given) - len(node["normalized_shape"])
    for other in others:
        for place, axis in enumerate(other, first):
            given[place] = tie(given[place], axis)
    for place in range(first, len(given)):
        axes.mix(given[place], given[:first])
    return given


def along_dim(node: Node, axes: Axes) -> list[Axis]:
    """softmax: over one axis, in whatever order its indices are."""
    (given,) = axes.operands(node)
    place = node["dim"] % len(given)
    axes.mix(given[place], given[:place] + given[place + 1 :])
    return given


def reduced(node: Node, axes: Axes) -> list[Axis]:
    """mean, sum, …: over some axes, in whatever order their indices are."""
    (given,) = axes.operands(node)
    rank = len(given)
    dims, keepdim = node.arguments.get("dim"), node.arguments.get("keepdim", False)
    dims = [dims] if isinstance(dims, int) else dims or []
    gone = {dim % rank for dim in dims} or set(range(rank))
    value: list[Axis] = []
    for place, axis in enumerate(given):
        if place not in gone:
            value.append(axis)
            continue
        axes.mix(axis, [other for i, other in enumerate(given) if i not in gone])
        if keepdim:
            value.append(Uniform(1))
    return value


def permuted(node: Node, axes: Axes) -> list[Axis]:
    """transpose and permute: the same axes in another order."""
    (given,) = axes.operands(node)
    rank = len(given)
    if node.op == "permute":
        return [given[dim % rank] for dim in node["dims"]]
    if rank > 1:
        one, other = (0, 1) if node.op == "t" else (node["dim0"] % rank, node["dim1"] % rank)
        given[one], given[other] = given[other], given[one]
    return given


def looked_up(node: Node, axes: Axes) -> list[Axis]:
    """Embedding: rows of a table are told apart by their numbers."""
    table, indices = axes.of(node["weight"]), axes.of(node["indices"])
    freeze_axes(node, table[:1], "rows are picked by their number")
    freeze_axes(node, indices, "rows are picked by their number")
    return [*indices, table[1]]


def multiplied(node: Node, axes: Axes) -> list[Axis]:
    """matmul: sums over the last axis of the first and the last but one of the second."""
    first, second = axes.operands(node)
    if min(len(first), len(second)) < 2:
        raise Unsupported("a product with a vector")
    summed = tie(first[-1], second[-2])
    axes.mix(summed, [*first[:-1], *second[:-2], second[-1]])
    batch = broadcast_axes([first[:-2], second[:-2]], len(node.shape) - 2)
    return [*batch, first[-2], second[-1]]


def attended(node: Node, axes: Axes) -> list[Axis]:
    """Attention [N, heads, tokens, features]: query heads are × copies where keys have fewer."""
    query, key, value = (axes.of(node[name]) for name in ("query", "key", "value"))
    features, tokens = tie(query[-1], key[-1]), tie(key[-2], value[-2])
    axes.mix(features, [*query[:-1], *key[:-1]])
    axes.mix(tokens, [*query[:-1], *key[:-2], *value[:-2], value[-1]])
    if node["is_causal"]:
        freeze_axes(node, [query[-2], key[-2]], "tokens are causal")
    batch = query[:-2]
    for other in (key[:-2], value[:-2]):
        if len(other) != len(batch):
            raise Unsupported("operands with other numbers of axes")
        for place, axis in enumerate(other):
            batch[place] = _of_heads(batch[place], axis)
    mask = node["attn_mask"]
    if isinstance(mask, In | Entry):
        *beside, rows, columns = axes.of(mask)
        freeze_axes(node, [rows, columns, query[-2], key[-2]], "tokens are masked")
        batch = broadcast_axes([batch, beside], len(batch))
    return [*batch, query[-2], value[-1]]


def _of_heads(queries: Axis, keys: Axis) -> Axis:
    """The axis of the queries' heads, of which several may share a head of keys."""
    if keys.size == 1:
        return queries
    if queries.size % keys.size:
        raise Unsupported("numbers of heads that are no multiples")
    copies = queries.size // keys.size
    return tie(queries, product([keys, Atom(copies)]) if copies > 1 else keys)


def padded(node: Node, axes: Axes) -> list[Axis]:
    """pad with a constant: uniform indices at the ends of axes, the last axis first."""
    (given,) = axes.operands(node)
    if node.arguments.get("mode", "constant") != "constant":
        raise Unsupported(f"padding by {node['mode']}")
    pads = node["pad"]
    for i in range(len(pads) // 2):
        before, after = pads[2 * i], pads[2 * i + 1]
        if not isinstance(before, int) or not isinstance(after, int) or min(before, after) < 0:
            raise Unsupported("a negative padding")
        if before or after:
            ends = Uniform(before), Uniform(after)
            given[-1 - i] = Sum([ends[0], resolve(given[-1 - i]), ends[1]])
    return given


def stacked(node: Node, axes: Axes) -> list[Axis]:
    """stack: a new axis, and all others alike."""
    tensors = [axes.of(leaf) for leaf in node["tensors"]]
    place = node["dim"] % len(node.shape)
    value = broadcast_axes(tensors, len(node.shape) - 1)
    return [*value[:place], Atom(len(tensors), f"{node.op}: different values"), *value[place:]]


def element(node: Node, axes: Axes) -> list[Axis]:
    """One of the values that an operation returns."""
    (several,) = axes.inputs
    if not several or not isinstance(several[0], list):
        raise Unsupported("an operation without a rule of its axes")
    return list(several[node["index"]])
