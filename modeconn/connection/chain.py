"""A network as the chain of layers that the theory speaks of: affine map, then what acts unit by unit, layer after layer.

"Unit" is a neuron of a linear layer or a channel of a convolution. Activations, pooling,
flattening, dropout in eval mode and batch norm in eval mode act unit by unit, so a unit's incoming
entries decide its values and its outgoing columns decide who sees them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture.export import capture, prepare
from modeconn.capture.graph import Node, Size
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]

_AFFINE = ("linear", "conv2d")
ACTIVATIONS = frozenset(
    "relu tanh sigmoid gelu silu elu leaky_relu softplus selu celu mish hardtanh hardswish hardsigmoid relu6 softsign "
    "logsigmoid tanhshrink softshrink hardshrink".split()
)
_POOLING = frozenset("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d".split())
_NOTHING = frozenset("dropout feature_dropout clone alias detach contiguous identity".split())


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode: the state-dict keys of its entries, None where it has none."""

    weight: str | None
    bias: str | None
    mean: str | None
    var: str | None
    eps: float

    @property
    def keys(self) -> tuple[str, ...]:
        """The entries that it has."""
        return tuple(
            key for key in (self.weight, self.bias, self.mean, self.var) if key is not None
        )


@dataclass(frozen=True)
class Layer:
    """Layer p of a chain: an affine map and the steps after it, up to the next affine map.

    Attributes:
        index: p, from 1.
        kind: "linear" or "conv2d".
        weight, bias: state-dict keys; weight is [n_p, n_{p-1} · block] or [n_p, n_{p-1}, kernel
            height, kernel width].
        norm: the batch norm among the steps, if any.
        affine: the graph's node of the affine map.
        steps: the nodes after it, in order; each acts unit by unit.
        activation: the non-linearity among the steps, "identity" if there is none.
        units: n_p.
        block: columns of the weight for each unit of the layer before: more than 1 where flattened
            channels come in.
        kernel: (height, width) of a convolution, () of a linear layer.
    """

    index: int
    kind: str
    weight: str
    bias: str | None
    norm: Norm | None
    affine: Node
    steps: tuple[Node, ...]
    activation: str
    units: int
    block: int
    kernel: tuple[int, ...]

    def incoming(self) -> tuple[str, ...]:
        """Keys of the entries whose row u belongs to unit u: weight, bias and those of the norm."""
        return (
            self.weight,
            *((self.bias,) if self.bias else ()),
            *(self.norm.keys if self.norm else ()),
        )

    def by_unit(self, weight: Tensor) -> Tensor:
        """A weight of this layer as [units, units before, numbers per pair of units], a view."""
        if self.kind == "linear":
            return weight.view(len(weight), weight.shape[1] // self.block, self.block)
        return weight.flatten(2)

    def select(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """The columns of a weight [·, …] that belong to some units of the layer before."""
        if self.kind == "linear" and self.block > 1:
            return self.by_unit(weight)[:, inputs].flatten(1)
        return weight[:, inputs]

    def finish(self, value: Tensor, state: State | None = None) -> Tensor:
        """The steps after the affine map. Without a state norms are left out: subnetworks have none."""
        for node in self.steps:
            if node.op == "batch_norm" and state is None:
                continue
            value = node.run(
                [value], [state[key] for key in node.entries] if state else [], len(value)
            )
        return value

    def apply(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, state: State | None = None
    ) -> Tensor:
        """The whole layer for a weight of any number of units: affine map and steps."""
        return self.finish(self.map(h, weight, bias), state)

    def map(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The affine map alone."""
        if self.kind == "linear":
            return nn.functional.linear(h, weight, bias)
        stride, padding, dilation = (_argument(self.affine, *which) for which in _GEOMETRY)
        return torch.conv2d(h, weight, bias, stride, padding, dilation)


@dataclass(frozen=True)
class Chain:
    """A network that is a chain of L layers, the last of them linear and the output.

    Attributes:
        layers: layers 1 … L.
        widths: n_0 … n_L.
        name: of the model's class, for messages.
        flattened: whether inputs are flattened to [N, n_0] first.
        keys: every entry of the state dict that is no layer's: left alone by constructions.
    """

    layers: tuple[Layer, ...]
    widths: tuple[int, ...]
    name: str
    flattened: bool
    others: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module, sample: Tensor) -> Chain:
        """Find the chain that a model is.

        Args:
            model: any module; it is left as it was.
            sample: a few rows of input.

        Raises:
            ModeconnError: it is no chain; the text says where and why.
        """
        kind = sample.dtype if sample.is_floating_point() else torch.float32
        graph = capture(prepare(model, kind, sample.device), sample)
        name = type(model).__name__
        if graph.fallback is not None:
            raise ModeconnError(
                f"{name} is not a chain of layers that can be connected: it could not be captured ({graph.fallback})"
            )
        output = graph.tensor_output
        if output is None:
            raise _refusal(name, "it returns more than one tensor")
        builder = _Builder(name, model.state_dict())
        value = 0
        for node in graph.nodes[1:]:
            if not node.batched:
                raise builder.refuse(node, "computes with entries alone")
            if list(node.inputs) != [value]:
                raise builder.refuse(
                    node,
                    "does not take the value just before it alone: residual sums, attention and branches are no chain",
                )
            builder.add(node, tuple(graph.nodes[value].shape))
            value = node.id
        if value != output:
            raise _refusal(name, "its output is not the last value")
        return builder.chain()

    @property
    def length(self) -> int:
        """L, the number of layers."""
        return len(self.layers)

    @property
    def classes(self) -> int:
        """n_L, the number of outputs."""
        return self.widths[-1]

    @property
    def linear_from(self) -> int:
        """The smallest entry layer l such that layers l+1 … L are all linear."""
        return max((layer.index for layer in self.layers if layer.kind != "linear"), default=0)

    def layer(self, p: int) -> Layer:
        """Layer p, from 1 to L."""
        return self.layers[p - 1]

    def input(self, x: Tensor) -> Tensor:
        """h_0 of raw inputs: flattened where the network flattens them."""
        return x.flatten(1) if self.flattened else x

    def affine(self, state: State, p: int, h: Tensor) -> Tensor:
        """The affine map of layer p alone."""
        layer = self.layer(p)
        return layer.map(h, state[layer.weight], state[layer.bias] if layer.bias else None)

    def run(self, state: State, h: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """h_stop from h_start; the logits where stop is None or L, and from raw inputs where start is 0."""
        if start == 0:
            h = self.input(h)
        for layer in self.layers[start : self.length if stop is None else stop]:
            h = layer.finish(self.affine(state, layer.index, h), state)
        return h


def _refusal(name: str, why: str) -> ModeconnError:
    return ModeconnError(f"{name} is not a chain of layers that can be connected: {why}")


_GEOMETRY = ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


class _Builder:
    """Takes the nodes in order and groups them into layers."""

    def __init__(self, name: str, state: State) -> None:
        self.name, self.state = name, state
        self.layers: list[Layer] = []
        self.widths: list[int] = []
        self.flattened = False
        self._affine: Node | None = None
        self._steps: list[Node] = []

    def refuse(self, node: Node, why: str) -> ModeconnError:
        return _refusal(self.name, f"{node.op} ({node.source}) {why}")

    def add(self, node: Node, before: tuple[Any, ...]) -> None:
        if node.op in _AFFINE:
            self._begin(node, before)
        elif node.op == "flatten":
            if self._affine is None:
                self.flattened = True
            self._steps.append(node)
        elif node.op in _NOTHING or (
            node.op == "reshape" and list(map(str, node.shape)) == list(map(str, before))
        ):
            pass
        elif self._affine is None:
            raise self.refuse(node, "comes before the first layer")
        elif node.op == "batch_norm":
            if any(step.op == "batch_norm" for step in self._steps):
                raise self.refuse(node, "is the second norm of a layer")
            if not all(key in self.state for key in node.entries):
                raise self.refuse(node, "uses entries that are not in the state dict")
            self._steps.append(node)
        elif (node.op in ACTIVATIONS or node.op in _POOLING) and not node.entries:
            self._steps.append(node)
        else:
            raise self.refuse(node, "does not act unit by unit")

    def _begin(self, node: Node, before: tuple[Any, ...]) -> None:
        self._end()
        weight = self.state.get(node.entries[0]) if node.entries else None
        if (
            weight is None
            or weight.dim() != (2 if node.op == "linear" else 4)
            or len(node.entries) > 2
        ):
            raise self.refuse(node, "has a weight that is computed or not in the state dict")
        if node.op == "conv2d" and _argument(node, 6, "groups", 1) != 1:
            raise self.refuse(
                node, "is a grouped convolution: its units do not read all units before"
            )
        if node.op == "linear" and len(before) != 2:
            raise self.refuse(
                node, f"takes values of shape {['N', *map(str, before[1:])]}, not [N, features]"
            )
        if not self.widths:
            self.widths.append(weight.shape[1])
        self._affine = node

    def _end(self) -> None:
        """Close the layer that began with the last affine map."""
        node, steps = self._affine, self._steps
        self._affine, self._steps = None, []
        if node is None:
            return
        keys = [key for layer in self.layers for key in layer.incoming()]
        if any(key in keys for key in node.entries):
            raise self.refuse(node, "shares its weight with another layer")
        weight = self.state[node.entries[0]]
        norms = [_norm(step) for step in steps if step.op == "batch_norm"]
        activations = [step.op for step in steps if step.op in ACTIVATIONS]
        if len(activations) > 1:
            raise self.refuse(node, f"is followed by two activations: {', '.join(activations)}")
        self.layers.append(
            Layer(
                len(self.layers) + 1,
                node.op,
                node.entries[0],
                node.entries[1] if len(node.entries) > 1 else None,
                norms[0] if norms else None,
                node,
                tuple(steps),
                activations[0] if activations else "identity",
                weight.shape[0],
                weight.shape[1] // self.widths[-1] if node.op == "linear" else 1,
                tuple(weight.shape[2:]),
            )
        )
        self.widths.append(weight.shape[0])

    def chain(self) -> Chain:
        self._end()
        if not self.layers:
            raise _refusal(self.name, "it has no linear layer")
        last = self.layers[-1]
        if last.kind != "linear" or last.steps:
            what = "a convolution" if last.kind != "linear" else f"followed by {last.steps[-1].op}"
            raise _refusal(
                self.name,
                f"its last layer, {last.weight}, is {what}; the output must be that of a linear layer",
            )
        used = {key for layer in self.layers for key in layer.incoming()}
        others = tuple(key for key in self.state if key not in used)
        return Chain(tuple(self.layers), tuple(self.widths), self.name, self.flattened, others)


def _norm(node: Node) -> Norm:
    names = list(node.entries)
    keys = [None if node.args[i] is None else names[node.args[i].index] for i in (1, 2, 3, 4)]
    mean, var, weight, bias = keys
    return Norm(weight, bias, mean, var, float(node.args[5]))


def block_rows(chain: Chain, sample: Tensor, budget: int = 32 << 20) -> int:
    """Rows whose widest value fits a budget of bytes: the batch of a plain pass."""
    h, widest = chain.input(sample[:1]), 1
    for layer in chain.layers:
        size = math.prod(d for d in layer.affine.shape[1:] if not isinstance(d, Size))
        widest = max(widest, size)
    return max(16, min(4096, budget // (4 * max(widest, h.numel()))))
