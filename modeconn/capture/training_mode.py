"""The graph of a network whose batch norms normalise by the statistics of the batch, as in training, and hand them out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.capture.graph import Entry, Graph, In, Node
from modeconn.capture.opaque import Names, Opaque


def training_graph(graph: Graph) -> tuple[Graph, list[Names]]:
    """The graph whose output is, per batch norm, the mean and the unbiased variance of its input over the batch."""
    nodes: list[Node] = []
    place: dict[int, int] = {}
    names: list[Names] = []
    found: list[tuple[In, In]] = []
    for node in graph.nodes:
        inputs = tuple(place[i] for i in node.inputs)
        pair = _running(node)
        if isinstance(node.function, Opaque) and node.function.statistics():
            place[node.id] = len(nodes)
            names += _closed(nodes, node, inputs, found)
            continue
        if pair is None:
            nodes.append(replace(node, id=len(nodes), inputs=inputs))
            place[node.id] = nodes[-1].id
            continue
        weight, bias = (
            (leaf.index if isinstance(leaf, Entry) else None) for leaf in node.args[3:5]
        )
        entries = [node.entries[i] for i in (weight, bias) if i is not None]
        leaves = [
            None if i is None else Entry(entries.index(node.entries[i])) for i in (weight, bias)
        ]
        joint = len(nodes)
        nodes.append(
            Node(
                joint,
                "batch_norm_training",
                normalised,
                (In(0), *leaves, node.args[5]),
                inputs,
                tuple(entries),
                node.shape,
                node.source,
            )
        )
        for part, shape in enumerate((node.shape, node.shape[1:2], node.shape[1:2])):
            nodes.append(
                Node(len(nodes), "getitem", _part, (In(0), part), (joint,), (), shape, node.source)
            )
        place[node.id] = joint + 1
        names.append(pair)
        found.append((In(joint + 2), In(joint + 3)))
    return Graph(tuple(nodes), found, graph.constants, mixes_rows=True, inputs=graph.inputs), names


def _closed(
    nodes: list[Node], node: Node, inputs: tuple[int, ...], found: list[tuple[In, In]]
) -> list[Names]:
    """The same for a module that could not be captured: it runs as it is, with its norms in training mode."""
    part: Opaque = node.function  # type: ignore[assignment]
    joint = len(nodes)
    nodes.append(replace(node, id=joint, inputs=inputs, function=part.training))
    own = dict(zip(part.names, node.entries, strict=True))
    pairs = part.statistics()
    for number in range(-2 * len(pairs), 0):
        nodes.append(
            Node(len(nodes), "getitem", _part, (In(0), number), (joint,), (), (), node.source)
        )
    found += [(In(joint + 1 + 2 * i), In(joint + 2 + 2 * i)) for i in range(len(pairs))]
    return [(own[mean], own[var]) for mean, var in pairs]


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch norm in training mode: its value, and the mean and unbiased variance of the batch, [channels] each."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    if (
        count > 1
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    ):
        # PyTorch's own kernel for this layout loses three digits of the variance in float32: two
        # passes keep them.
        flat = x.permute(0, 2, 3, 1).reshape(-1, channels)
        mean = flat.mean(0)
        var = (flat - mean).square_().mean(0)
        return (
            F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps),
            mean,
            var * (count / (count - 1)),
        )
    mean, var = x.new_zeros(channels), x.new_zeros(channels)
    return F.batch_norm(x, mean, var, weight, bias, training=True, momentum=1.0, eps=eps), mean, var


def _part(values: tuple[Tensor, ...], index: int) -> Tensor:
    return values[index]


def _running(node: Node) -> Names | None:
    """The names of a batch norm's running statistics; None for anything else."""
    if node.op != "batch_norm" or len(node.inputs) != 1 or node.args[0] != In(0):
        return None
    leaves = node.args[1:3]
    if not all(isinstance(leaf, Entry) for leaf in leaves) or any(
        isinstance(leaf, In) for leaf in node.args[3:5]
    ):
        return None
    mean, var = (node.entries[leaf.index] for leaf in leaves)
    return mean, var
