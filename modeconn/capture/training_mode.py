"""Graphs with batch norms in training mode, which normalise by the batch's own statistics."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.capture import ops
from modeconn.capture.graph import Dim, Entry, Graph, In, Node
from modeconn.capture.opaque import Names, Opaque


def training_graph(graph: Graph) -> tuple[Graph, list[Names]]:
    """Rewrites a graph for an estimate of its batch norms' statistics.

    Returns:
        the graph whose output is, per batch norm, the mean and the unbiased variance of its input
        over the batch; and per batch norm the names of its running statistics.
    """
    rewriting = _Rewriting()
    for node in graph.nodes:
        rewriting.add(node)
    nodes, found = tuple(rewriting.nodes), rewriting.statistics
    training = Graph(nodes, found, graph.constants, mixes_rows=True, inputs=graph.inputs)
    return training, rewriting.names


class _Rewriting:
    """The nodes rewritten so far.

    Attributes:
        names: per batch norm the names of its running mean and variance.
        statistics: per batch norm the leaves that are the batch's mean and variance.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.names: list[Names] = []
        self.statistics: list[tuple[In, In]] = []
        self._ids: dict[int, int] = {}  # id of a node in the given graph → its id here

    def add(self, node: Node) -> None:
        """Adds a node of the given graph."""
        inputs = tuple(self._ids[i] for i in node.inputs)
        if isinstance(node.function, Opaque) and node.function.statistics():
            self._add_module(node, node.function, inputs)
        elif (names := _running(node)) is not None:
            self._add_norm(node, names, inputs)
        else:
            self._ids[node.id] = self._append(replace(node, id=len(self.nodes), inputs=inputs))

    def _append(self, node: Node) -> int:
        self.nodes.append(node)
        return node.id

    def _append_part(self, whole: Node, index: int, shape: tuple[Dim, ...]) -> int:
        """Adds one of the values that a node returns."""
        arguments = {"values": In(0), "index": index}
        id_ = len(self.nodes)
        part = Node(id_, "getitem", ops.element, arguments, (whole.id,), (), shape, whole.source)
        return self._append(part)

    def _add_norm(self, node: Node, names: Names, inputs: tuple[int, ...]) -> None:
        given = [leaf for leaf in (node["weight"], node["bias"]) if leaf is not None]
        entries = tuple(node.entries[leaf.index] for leaf in given)
        arguments = {
            "input": In(0),
            "weight": None if node["weight"] is None else Entry(0),
            "bias": None if node["bias"] is None else Entry(len(given) - 1),
            "eps": node["eps"],
        }
        norm = Node(
            len(self.nodes),
            "batch_norm_training",
            normalised,
            arguments,
            inputs,
            entries,
            node.shape,
            node.source,
        )
        self._append(norm)
        channels = node.shape[1:2]
        self._ids[node.id] = self._append_part(norm, 0, node.shape)
        mean, var = (self._append_part(norm, index, channels) for index in (1, 2))
        self.names.append(names)
        self.statistics.append((In(mean), In(var)))

    def _add_module(self, node: Node, part: Opaque, inputs: tuple[int, ...]) -> None:
        """Adds a closed part that runs as it is, with its batch norms in training mode."""
        module = replace(node, id=len(self.nodes), inputs=inputs, function=part.training)
        self._ids[node.id] = self._append(module)
        own = dict(zip(part.names, node.entries, strict=True))
        pairs = part.statistics()
        # The statistics come after the tensors of the output, of which there may be any number.
        leaves = [In(self._append_part(module, i, ())) for i in range(-2 * len(pairs), 0)]
        self.statistics += zip(leaves[::2], leaves[1::2])
        self.names += [(own[mean], own[var]) for mean, var in pairs]


def normalised(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training mode: its value, the batch's mean and unbiased variance [channels]."""
    channels, count = input.shape[1], input.numel() // input.shape[1]
    image = input.dim() == 4
    channels_last = image and input.is_contiguous(memory_format=torch.channels_last)
    if count > 1 and channels_last and not input.is_contiguous():
        # PyTorch's own kernel for this layout loses three digits of the variance in float32: two
        # passes keep them.
        flat = input.permute(0, 2, 3, 1).reshape(-1, channels)
        mean = flat.mean(0)
        var = (flat - mean).square_().mean(0)
        value = F.batch_norm(input, mean, var, weight, bias, training=False, eps=eps)
        return value, mean, var * (count / (count - 1))
    mean, var = input.new_zeros(channels), input.new_zeros(channels)
    value = F.batch_norm(input, mean, var, weight, bias, training=True, momentum=1.0, eps=eps)
    return value, mean, var


def _running(node: Node) -> Names | None:
    """The names of a batch norm's running statistics; None for anything else."""
    if node.op != "batch_norm" or len(node.inputs) != 1 or node["input"] != In(0):
        return None
    mean, var = node["mean"], node["var"]
    if not isinstance(mean, Entry) or not isinstance(var, Entry):
        return None
    if isinstance(node["weight"], In) or isinstance(node["bias"], In):
        return None
    return node.entries[mean.index], node.entries[var.index]
