"""Proves from the graph that a sample's output does not depend on the other samples of its batch.

A value is *aligned* if its first axis is the samples and each sample's part is a function of that
sample alone. Inputs are aligned; a node is if its operation works sample by sample on aligned
inputs, which is known of the operations below, by their arguments. What cannot be proved may still
be so: capture then looks at numbers, with as many samples as a batch has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from modeconn.capture import ops
from modeconn.capture.graph import Graph, In, Node, Size

# Whether a node works sample by sample on its inputs, each of which is aligned or unbatched.
Proof = Callable[[Node, "Sequence[Node]"], bool]


def rows_are_independent(graph: Graph) -> bool:
    """Whether it is proved that every sample's output is a function of that sample alone."""
    aligned: set[int] = set()
    for node in graph.nodes:
        if not node.batched:
            if not _equal_for_all_samples(node):
                return False
        elif _is_aligned(node, graph, aligned):
            aligned.add(node.id)
    return all(node_id in aligned for node_id in graph.outputs())


def _is_aligned(node: Node, graph: Graph, aligned: set[int]) -> bool:
    if node.op == "input":
        return _has_samples(node)
    inputs = [graph.nodes[i] for i in node.inputs]
    if node.random or not all(each.id in aligned for each in inputs if each.batched):
        return False
    if node.op == "getitem":
        return _has_samples(node)
    proof = _PROOFS.get(node.op, _pointwise)
    several = not node.shape  # a tuple of values: what is taken out of it is looked at then
    return (several or _has_samples(node)) and proof(node, inputs)


def _has_samples(node: Node) -> bool:
    """Whether the first axis is the samples, and no other."""
    sizes = list(map(str, node.shape))
    return bool(sizes) and sizes[0] == "N" and all(not isinstance(s, Size) for s in node.shape[1:])


def _equal_for_all_samples(node: Node) -> bool:
    """Whether an unbatched value is alike for every sample, however many there are."""
    if not any(isinstance(leaf, Size) for leaf in _leaves(node)):
        return True
    return node.op in (
        "expand",
        "zeros",
        "ones",
        "full",
        "new_zeros",
        "new_ones",
        "new_full",
        "zeros_like",
    )


def _leaves(node: Node) -> list[Any]:
    flat: list[Any] = []
    pending: list[Any] = list(node.arguments.values())
    while pending:
        item = pending.pop()
        if isinstance(item, (list, tuple)):
            pending.extend(item)
        else:
            flat.append(item)
    return flat


# Pointwise operations that PyTorch does not tag as such.
_UNTAGGED = frozenset("hardswish hardsigmoid hardtanh prelu log_sigmoid rrelu softshrink".split())


# -- proofs ----------------------------------------------------------------------------------------


def _always(node: Node, inputs: Sequence[Node]) -> bool:
    return True


def _pointwise(node: Node, inputs: Sequence[Node]) -> bool:
    """Number by number: batched values have equal ranks, so that samples meet their own."""
    tags = getattr(node.function, "tags", ())
    own = node.function is ops.subtract
    known = torch.Tag.pointwise in tags or node.op in _UNTAGGED or own
    uses_count = any(isinstance(leaf, Size) for leaf in _leaves(node))
    return known and not uses_count and _meet(node, inputs)


def _meet(node: Node, inputs: Sequence[Node]) -> bool:
    """Whether the inputs' samples meet along the first axis of the value."""
    rank = len(node.shape)
    for each in inputs:
        if each.batched and len(each.shape) != rank:
            return False
        if not each.batched and len(each.shape) >= rank and str(each.shape[0]) not in ("1", "N"):
            return False
    return True


def _by_sample(least: int) -> Proof:
    """Layers that take a batch of samples of at least so many axes in all."""

    def proof(node: Node, inputs: Sequence[Node]) -> bool:
        return bool(inputs) and node.first == In(0) and len(inputs[0].shape) >= least

    return proof


def _along(name: str = "dim") -> Proof:
    """Along axes that are not the first one; None stands for all of them."""

    def proof(node: Node, inputs: Sequence[Node]) -> bool:
        dims = node.arguments.get(name)
        rank = len(inputs[0].shape) if inputs else 0
        dims = [dims] if isinstance(dims, int) else dims
        if not rank or not isinstance(dims, (list, tuple)) or not dims:
            return False
        axes = [d % rank for d in dims if isinstance(d, int)]
        return len(axes) == len(dims) and 0 not in axes and _meet_all(inputs)

    return proof


def _meet_all(inputs: Sequence[Node]) -> bool:
    """Whether all inputs have the samples in front."""
    return all(_has_samples(each) for each in inputs)


def _new_shape(node: Node, inputs: Sequence[Node]) -> bool:
    """A view keeps the order of numbers: with the samples in front, each stays whole."""
    return len(inputs) == 1 and _has_samples(inputs[0])


def _permutation(node: Node, inputs: Sequence[Node]) -> bool:
    dims, rank = node.arguments.get("dims"), len(node.shape)
    return isinstance(dims, (list, tuple)) and len(dims) == rank and bool(dims[0] % rank == 0)


def _transposition(node: Node, inputs: Sequence[Node]) -> bool:
    rank = len(node.shape)
    return bool(node["dim0"] % rank and node["dim1"] % rank)


def _norm_of_last(node: Node, inputs: Sequence[Node]) -> bool:
    return len(inputs) == 1 and len(node["normalized_shape"]) < len(node.shape)


def _product(node: Node, inputs: Sequence[Node]) -> bool:
    """matmul: samples times samples, or either times what is the same for all."""
    if len(inputs) == 2 and all(each.batched for each in inputs):
        return len(inputs[0].shape) == len(inputs[1].shape) >= 3
    left = node.first == In(0) and bool(inputs) and inputs[0].batched
    batched = [each for each in inputs if each.batched]
    fixed = [each for each in inputs if not each.batched]
    plain = not any(map(_has_size, fixed))
    return plain and len(batched) == 1 and len(batched[0].shape) >= (2 if left else 3)


def _attention(node: Node, inputs: Sequence[Node]) -> bool:
    leaves = [node[name] for name in ("query", "key", "value")]
    taken = {leaf.index for leaf in leaves if isinstance(leaf, In)}
    values = [each for i, each in enumerate(inputs) if i in taken]
    masks = [each for i, each in enumerate(inputs) if i not in taken]
    return (
        len(values) == 3 and _meet_all(values) and len(node.shape) >= 3 and _meet_masks(node, masks)
    )


def _meet_masks(node: Node, masks: Sequence[Node]) -> bool:
    return all(
        (each.batched and _has_samples(each) and len(each.shape) == len(node.shape))
        or (not each.batched and not _has_size(each))
        for each in masks
    )


def _has_size(node: Node) -> bool:
    """Whether an axis of a value has the length of the batch."""
    return any(isinstance(size, Size) for size in node.shape)


def _looked_up(node: Node, inputs: Sequence[Node]) -> bool:
    return len(inputs) == 1 and node["indices"] == In(0)


def _padding(node: Node, inputs: Sequence[Node]) -> bool:
    return len(inputs) == 1 and len(node["pad"]) // 2 < len(node.shape)


_PROOFS: dict[str, Proof] = {
    **dict.fromkeys(("linear", "batch_norm", "group_norm"), _by_sample(2)),
    **dict.fromkeys(
        ("conv1d", "conv_transpose1d", "max_pool1d", "avg_pool1d", "adaptive_avg_pool1d"),
        _by_sample(3),
    ),
    **dict.fromkeys(
        (
            "conv2d conv_transpose2d max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d "
            "upsample_nearest2d upsample_bilinear2d"
        ).split(),
        _by_sample(4),
    ),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm_of_last),
    **dict.fromkeys(
        (
            "softmax log_softmax cumsum cumprod sort argsort topk argmax argmin mean sum amax amin "
            "prod var std logsumexp all any max min cat stack slice select squeeze unsqueeze "
            "index_select gather linalg_vector_norm glu"
        ).split(),
        _along(),
    ),
    **dict.fromkeys(("flip", "roll"), _along("dims")),
    **dict.fromkeys(("reshape", "flatten", "unflatten", "expand"), _new_shape),
    **dict.fromkeys(
        ("clone", "alias", "contiguous", "detach", "dropout", "feature_dropout"), _always
    ),
    "permute": _permutation,
    "transpose": _transposition,
    **dict.fromkeys(("matmul", "bmm"), _product),
    "scaled_dot_product_attention": _attention,
    "embedding": _looked_up,
    "pad": _padding,
}
