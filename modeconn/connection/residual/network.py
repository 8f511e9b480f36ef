"""Recognises residual networks on the captured graph: a stem, blocks on a stream, a linear head.

    v_0 = relu(norm(conv x))                       the stem, perhaps followed by a pooling
    u_k^1 = relu(norm(conv v_{k-1})), u_k^2, …     inner values of block k
    v_k = relu(norm(conv u_k) + shortcut(v_{k-1})) the stream; the shortcut is the identity,
                                                   or a convolution with a norm
    f(x) = W mean(v_K) + b

That is the form of He et al. 2016, whatever the module calls its parts. Norms are batch norms in
eval mode, so that channels depend on each other through convolutions alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeconn.capture.export import capture, prepare
from modeconn.capture.graph import Entry, Graph, In, Node
from modeconn.connection.layer_chain import Norm
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]

# Operations that leave values as they are in eval mode.
_IDENTITIES = frozenset("dropout feature_dropout clone alias detach contiguous identity".split())
# Operations on each channel that keep non-negative values so, and zeros.
_POOLING = frozenset(
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d mean flatten reshape".split()
)


@dataclass(frozen=True)
class ConvNorm:
    """A convolution followed by a batch norm.

    Attributes:
        weight, bias: keys of the convolution's; bias is None where it has none.
        norm: keys of the norm's.
        conv, batch_norm: their nodes.
        inputs, outputs: numbers of channels.
    """

    weight: str
    bias: str | None
    norm: Norm
    conv: Node
    batch_norm: Node
    inputs: int
    outputs: int

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the tensors whose row c belongs to channel c of its value."""
        bias = () if self.bias is None else (self.bias,)
        return (self.weight, *bias, *self.norm.keys)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies the convolution alone, with a weight of any number of channels."""
        conv = self.conv
        return torch.conv2d(x, weight, bias, conv["stride"], conv["padding"], conv["dilation"])


@dataclass(frozen=True)
class Block:
    """Block k: its branch, one convolution after another, and its shortcut.

    Attributes:
        branch: at least two convolutions. The values between them are u_k^1, u_k^2, …
        shortcut: None for the identity.
        inner: nodes of u_k^1, u_k^2, …; stream: node of v_k.
    """

    branch: tuple[ConvNorm, ...]
    shortcut: ConvNorm | None
    inner: tuple[int, ...]
    stream: int


@dataclass(frozen=True, eq=False)
class ResidualNetwork:
    """A residual network with K blocks.

    Attributes:
        graph: the captured graph.
        stem: its convolution and norm. blocks: blocks 1 … K.
        after_stem: nodes after the stem's activation, up to v_0. head: nodes from v_K to the value
            that the linear layer reads.
        start: node of v_0.
        weight, bias: keys of the linear layer.
        classes: outputs. name: of the model's class.
    """

    graph: Graph
    stem: ConvNorm
    after_stem: tuple[Node, ...]
    start: int
    blocks: tuple[Block, ...]
    head: tuple[Node, ...]
    weight: str
    bias: str | None
    classes: int
    name: str

    @staticmethod
    def of(model: nn.Module, sample: Tensor) -> ResidualNetwork:
        """Finds the residual network that a model is.

        Raises:
            ModeconnError: it is none; the text names the first node that does not fit.
        """
        graph = capture(prepare(model, sample.dtype, sample.device), sample)
        name = type(model).__name__
        if graph.fallback is not None or graph.tensor_output is None or len(graph.inputs) != 1:
            raise _refusal(name, graph.fallback or "it does not map one tensor to one tensor")
        return _Reader(graph, name, model.state_dict()).network()

    @property
    def length(self) -> int:
        """K, the number of blocks."""
        return len(self.blocks)

    def channels(self, k: int) -> int:
        """Returns the number of channels of v_k."""
        return self.stem.outputs if k == 0 else self.blocks[k - 1].branch[-1].outputs

    def stream(self, k: int) -> int:
        """Returns the node of v_k."""
        return self.start if k == 0 else self.blocks[k - 1].stream

    def pooled(self, v: Tensor) -> Tensor:
        """Returns what the linear layer reads of v_K, of any number of channels."""
        return _through(self.head, v)

    def stemmed(self, h: Tensor) -> Tensor:
        """Returns v_0 of the stem's normalised convolution, of any number of channels."""
        return _through(self.after_stem, torch.relu(h))


def _through(nodes: Sequence[Node], value: Tensor) -> Tensor:
    for node in nodes:
        value = value.flatten(1) if node.op == "reshape" else node.run([value], [], len(value))
    return value


def _refusal(name: str, why: str) -> ModeconnError:
    return ModeconnError(f"{name} is not a residual network that can be connected: {why}")


class _Reader:
    """Walks a graph from its input along the stream."""

    def __init__(self, graph: Graph, name: str, state: State) -> None:
        self.graph, self.name, self.state = graph, name, state
        self.used: set[str] = set()
        self.readers: dict[int, list[Node]] = {node.id: [] for node in graph.nodes}
        for node in graph.nodes:
            for i in dict.fromkeys(node.inputs):
                self.readers[i].append(node)

    def refuse(self, node: Node, why: str) -> ModeconnError:
        return _refusal(self.name, f"{node.op} ({node.source}) {why}")

    def network(self) -> ResidualNetwork:
        stem, value = self._conv_norm(self._only(0))
        value = self._relu(value)
        after_stem, value = self._pooling(value)
        start, blocks = value, []
        while len(self._next(value)) > 1:
            block = self._block(value)
            blocks.append(block)
            value = block.stream
        if not blocks:
            raise _refusal(self.name, "it has no blocks with a shortcut")
        head, value = self._pooling(value)
        last = self._only(value)
        if last.op != "linear" or last.id != self._output():
            raise self.refuse(last, "is not the last linear layer behind the mean over pixels")
        weight, bias = self._weights(last)
        shape = self.state[weight].shape
        if shape[1] != blocks[-1].branch[-1].outputs:
            raise self.refuse(last, "does not read one number of each channel")
        return ResidualNetwork(
            self.graph,
            stem,
            after_stem,
            start,
            tuple(blocks),
            head,
            weight,
            bias,
            int(shape[0]),
            self.name,
        )

    def _output(self) -> int:
        """Returns the node of the output, before operations that leave it as it is."""
        node = self.graph.nodes[self.graph.tensor_output or 0]
        while node.op in _IDENTITIES:
            node = self.graph.nodes[node.inputs[0]]
        return node.id

    def _next(self, value: int) -> list[Node]:
        """Returns the nodes that take a value, past those that leave it as it is."""
        found: list[Node] = []
        for node in self.readers[value]:
            found += self._next(node.id) if node.op in _IDENTITIES else [node]
        return found

    def _only(self, value: int) -> Node:
        found = self._next(value)
        if len(found) != 1:
            source = self.graph.nodes[value]
            raise self.refuse(source, f"is read by {len(found)} operations: expected one here")
        return found[0]

    def _relu(self, value: int) -> int:
        node = self._only(value)
        if node.op != "relu":
            raise self.refuse(node, "comes where a ReLU keeps the stream non-negative")
        return node.id

    def _pooling(self, value: int) -> tuple[tuple[Node, ...], int]:
        """Follows operations that act channel by channel."""
        nodes: list[Node] = []
        while len(found := self._next(value)) == 1 and found[0].op in _POOLING:
            (node,) = found
            by_channel = len(node.shape) == 4 or (
                len(node.shape) == 2 and str(node.shape[1]) == str(self.graph.nodes[value].shape[1])
            )
            if node.entries or not by_channel:
                raise self.refuse(node, "does not act channel by channel")
            nodes.append(node)
            value = node.id
        return tuple(nodes), value

    def _block(self, value: int) -> Block:
        """Reads the block that begins at a value of the stream."""
        sides = self._next(value)
        if len(sides) != 2:
            raise self.refuse(
                self.graph.nodes[value],
                f"is read by {len(sides)} operations: expected a branch and a shortcut",
            )
        paths = [self._side(node) for node in sides]
        sums = {total for _, _, total in paths}
        if len(sums) != 1:
            raise self.refuse(sides[0], "and the shortcut beside it do not end in one sum")
        paths.sort(key=lambda path: len(path[0]))
        (short, _, total), (branch, inner, _) = paths
        if len(short) > 1 or len(branch) < 2:
            raise self.refuse(
                sides[0], "is no branch of two or more convolutions beside a shortcut of one"
            )
        if len(inner) != len(branch) - 1:
            raise self.refuse(sides[0], "begins a branch with no ReLU between convolutions")
        if len(short) == 0 and branch[-1].outputs != branch[0].inputs:
            raise self.refuse(sides[0], "changes the channels beside an identity")
        shortcut = short[0] if short else None
        return Block(tuple(branch), shortcut, tuple(inner), self._relu(total))

    def _side(self, node: Node) -> tuple[list[ConvNorm], list[int], int]:
        """Follows one side of a block to the sum: its convolutions and the values between them."""
        pieces: list[ConvNorm] = []
        inner: list[int] = []
        while node.op != "add":
            piece, value = self._conv_norm(node)
            pieces.append(piece)
            node = self._only(value)
            if node.op == "relu":
                inner.append(node.id)
                node = self._only(node.id)
                if node.op == "add":
                    raise self.refuse(node, "adds a branch that ends in an activation")
        plain = len(node.inputs) == 2 and node.arguments.get("alpha", 1) == 1 and not node.entries
        if not plain:
            raise self.refuse(node, "is not a sum of two values")
        return pieces, inner, node.id

    def _conv_norm(self, node: Node) -> tuple[ConvNorm, int]:
        """Reads a convolution and the batch norm after it; returns the norm's node."""
        if node.op != "conv2d" or node["groups"] != 1:
            raise self.refuse(node, "comes where a convolution of one group was expected")
        weight, bias = self._weights(node)
        norm = self._only(node.id)
        if norm.op != "batch_norm" or not isinstance(norm["var"], Entry):
            raise self.refuse(norm, "comes where a batch norm in eval mode was expected")
        names = {
            name: None if norm[name] is None else norm.entries[norm[name].index]
            for name in ("weight", "bias", "mean", "var")
        }
        if (names["weight"] is None) != (names["bias"] is None):
            raise self.refuse(norm, "has one of weight and bias alone")
        self._use(norm, [key for key in names.values() if key is not None])
        keys = Norm(names["weight"], names["bias"], names["mean"], names["var"], norm["eps"])
        outputs, inputs = self.state[weight].shape[:2]
        return ConvNorm(weight, bias, keys, node, norm, inputs, outputs), norm.id

    def _weights(self, node: Node) -> tuple[str, str | None]:
        """Returns the keys of a node's weight and bias."""
        expected = node["input"] == In(0) and isinstance(node["weight"], Entry)
        if not expected or isinstance(node["bias"], In):
            raise self.refuse(node, "has a weight that is computed")
        self._use(node, node.entries)
        bias = node["bias"]
        return node.entries[node["weight"].index], bias and node.entries[bias.index]

    def _use(self, node: Node, keys: Sequence[str]) -> None:
        for key in keys:
            if key not in self.state or key in self.used:
                raise self.refuse(node, f"reads {key}, which is shared or not in the state dict")
            self.used.add(key)
