"""Finds the chain of layers that a network is: affine map, then unit-wise steps, layer after layer.

The theory (Nguyen, Bréchet, Mondelli 2021, section 2) speaks of

    h_0 = x,   h_p = σ(W_p h_{p-1} + b_p) for p = 1 … L-1,   f(x) = W_L h_{L-1} + b_L.

A *unit* is a neuron of a linear layer or a channel of a convolution. Activations, pooling,
flattening, dropout in eval mode and batch norm in eval mode act unit by unit, so the values of a
unit depend on its incoming weights, and the layers above see it through its outgoing weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture.export import capture, prepare
from modeconn.capture.graph import Node, Size
from modeconn.connection.fixed_inputs import FixedInputs, is_fixed_step
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]

# By operation of an affine map: the dimensions of its weight.
_AFFINE = {"linear": 2, "conv1d": 3, "conv2d": 4}
ACTIVATIONS = frozenset(
    "relu tanh sigmoid gelu silu elu leaky_relu softplus selu celu mish hardtanh hardswish "
    "hardsigmoid relu6 softsign logsigmoid tanhshrink softshrink hardshrink".split()
)
# Poolings that are linear, and those that are not.
AVERAGES = frozenset("avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d".split())
_MAXIMA = frozenset("max_pool1d max_pool2d adaptive_max_pool1d adaptive_max_pool2d".split())
_POOLING = AVERAGES | _MAXIMA
# Operations that leave values as they are in eval mode.
_IDENTITIES = frozenset("dropout feature_dropout clone alias detach contiguous identity".split())
# Bytes of the widest value of a plain pass, and the rows that it may have: fewer leave vector units
# idle, more bring nothing.
_PLAIN_BUDGET = 32 << 20
_FEWEST_ROWS, _MOST_ROWS = 16, 4096


@dataclass(frozen=True)
class Norm:
    """A batch norm in eval mode: state-dict keys of its parameters and buffers, None if absent."""

    weight: str | None
    bias: str | None
    mean: str | None
    var: str | None
    eps: float

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the parameters and buffers that it has."""
        keys = (self.weight, self.bias, self.mean, self.var)
        return tuple(key for key in keys if key is not None)


@dataclass(frozen=True)
class AffineLayer:
    """Layer p of a chain: an affine map and the steps after it, up to the next affine map.

    Attributes:
        index: p, from 1.
        kind: "linear", "conv1d" or "conv2d".
        weight, bias: state-dict keys; weight is [n_p, n_{p-1} · block], or [n_p, n_{p-1}, …] with
            the kernel's size.
        norm: the batch norm among the steps, if any.
        affine: the graph's node of the affine map.
        steps: the nodes after it, in order; each acts unit by unit.
        activation: the non-linearity among the steps, "identity" if there is none.
        units: n_p.
        block: columns of the weight for each unit of the layer before: more than 1 where flattened
            channels come in.
        kernel: the size of a convolution's kernel, () of a linear layer.
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
        """Keys of the tensors whose row u belongs to unit u: weight, bias and those of the norm."""
        bias = (self.bias,) if self.bias else ()
        norm = self.norm.keys if self.norm else ()
        return (self.weight, *bias, *norm)

    def by_unit(self, weight: Tensor) -> Tensor:
        """Views a weight of this layer as [units, units before, coefficients of the pair]."""
        if self.kind == "linear":
            return weight.view(len(weight), weight.shape[1] // self.block, self.block)
        return weight.flatten(2)

    def select(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """Selects the columns of a weight [·, …] that belong to some units of the layer before."""
        if self.kind == "linear" and self.block > 1:
            return self.by_unit(weight)[:, inputs].flatten(1)
        return weight[:, inputs]

    def finish(self, value: Tensor, state: State | None = None) -> Tensor:
        """Applies the steps after the affine map; without a state norms are left out.

        Subnetworks have no norms.
        """
        for node in self.steps:
            if node.op == "batch_norm" and state is None:
                continue
            tensors = [state[key] for key in node.entries] if state else []
            value = node.run([value], tensors, len(value))
        return value

    def apply(
        self, h: Tensor, weight: Tensor, bias: Tensor | None, state: State | None = None
    ) -> Tensor:
        """Applies the whole layer with a weight of any number of units: affine map and steps."""
        return self.finish(self.map(h, weight, bias), state)

    def map(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Applies the affine map alone."""
        if self.kind == "linear":
            return nn.functional.linear(h, weight, bias)
        convolve = torch.conv1d if self.kind == "conv1d" else torch.conv2d
        return convolve(h, weight, bias, *self.geometry())

    def geometry(self) -> tuple[Any, ...]:
        """Returns stride, padding and dilation of a convolution, () for a linear layer."""
        if self.kind == "linear":
            return ()
        return (self.affine["stride"], self.affine["padding"], self.affine["dilation"])


@dataclass(frozen=True)
class LayerChain:
    """A network that is a chain of L layers, the last of them the output.

    The last layer is linear, or a convolution whose channels are averaged: its outputs are linear
    in its weights in both cases.

    Attributes:
        layers: layers 1 … L.
        widths: n_0 … n_L.
        name: of the model's class, for messages.
        fixed: what is done to the inputs first; it does not move.
        others: keys of the parameters and buffers that are no layer's: constructions leave them.
    """

    layers: tuple[AffineLayer, ...]
    widths: tuple[int, ...]
    name: str
    fixed: FixedInputs = field(default_factory=FixedInputs)
    others: tuple[str, ...] = ()

    @staticmethod
    def of(model: nn.Module, sample: Tensor) -> LayerChain:
        """Finds the chain that a model is.

        Args:
            model: any module; it is left as it was.
            sample: a few rows of input.

        Raises:
            ModeconnError: the model is no chain; the text says where and why.
        """
        kind = sample.dtype if sample.is_floating_point() else torch.float32
        graph = capture(prepare(model, kind, sample.device), sample)
        name = type(model).__name__
        if graph.fallback is not None:
            raise _refusal(name, f"it could not be captured ({graph.fallback})")
        output = graph.tensor_output
        if output is None:
            raise _refusal(name, "it returns more than one tensor")
        builder = _Builder(name, model.state_dict(), graph.constants)
        value = 0
        for node in graph.nodes[1:]:
            if not node.batched:
                raise builder.refuse(node, "computes with parameters and buffers alone")
            if list(node.inputs) != [value]:
                raise builder.refuse(
                    node,
                    "does not take the value just before it alone: "
                    "residual sums, attention and branches are no chain",
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

    def layer(self, p: int) -> AffineLayer:
        """Returns layer p, from 1 to L."""
        return self.layers[p - 1]

    def input(self, x: Tensor, state: State) -> Tensor:
        """Returns h_0 of raw inputs: flattened, say, where the network flattens them."""
        return self.fixed.apply(x, state)

    def affine(self, state: State, p: int, h: Tensor) -> Tensor:
        """Applies the affine map of layer p alone."""
        layer = self.layer(p)
        return layer.map(h, state[layer.weight], state[layer.bias] if layer.bias else None)

    def run(self, state: State, h: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Computes h_stop from h_start.

        Args:
            state: the network's weights.
            h: h_start; raw inputs where start is 0.
            start, stop: layers start + 1 … stop are run; the logits come out where stop is L or
                None.
        """
        if start == 0:
            h = self.input(h, state)
        for layer in self.layers[start : self.length if stop is None else stop]:
            h = layer.finish(self.affine(state, layer.index, h), state)
        return h


def _refusal(name: str, why: str) -> ModeconnError:
    return ModeconnError(f"{name} is not a chain of layers that can be connected: {why}")


class _Builder:
    """Groups the nodes of a graph, taken in order, into layers."""

    def __init__(self, name: str, state: State, constants: State) -> None:
        self.name, self.state, self.constants = name, state, constants
        self.layers: list[AffineLayer] = []
        self.widths: list[int] = []
        self.fixed: list[Node] = []
        self._affine: Node | None = None
        self._steps: list[Node] = []

    def refuse(self, node: Node, why: str) -> ModeconnError:
        return _refusal(self.name, f"{node.op} ({node.source}) {why}")

    def add(self, node: Node, before: tuple[Any, ...]) -> None:
        """Adds a node to the layer, or begins the next layer with it.

        Args:
            before: the shape of the value that it takes.
        """
        if node.op in _AFFINE:
            self._begin(node, before)
        elif node.op in _IDENTITIES or (node.op == "reshape" and _keeps_shape(node, before)):
            pass
        elif self._affine is None:
            self._add_fixed(node, before)
        elif node.op == "flatten":
            self._steps.append(node)
        elif node.op == "batch_norm":
            self._add_norm(node)
        elif (node.op in ACTIVATIONS or node.op in _POOLING) and not node.entries:
            self._steps.append(node)
        else:
            raise self.refuse(node, "does not act unit by unit")

    def _add_fixed(self, node: Node, before: tuple[Any, ...]) -> None:
        """Adds a node before the first layer."""
        fits = is_fixed_step(node) and _keeps_shape(node, before)
        known = all(key in self.state or key in self.constants for key in node.entries)
        if node.op != "flatten" and not (fits and known):
            raise self.refuse(node, "comes before the first layer, and is no fixed sum or norm")
        self.fixed.append(node)

    def _add_norm(self, node: Node) -> None:
        if any(step.op == "batch_norm" for step in self._steps):
            raise self.refuse(node, "is the second norm of a layer")
        if not all(key in self.state for key in node.entries):
            raise self.refuse(node, "uses parameters or buffers that are not in the state dict")
        self._steps.append(node)

    def _begin(self, node: Node, before: tuple[Any, ...]) -> None:
        """Closes the layer before and begins one with an affine map."""
        self._end()
        weight = self.state.get(node.entries[0]) if node.entries else None
        if weight is None or weight.dim() != _AFFINE[node.op] or len(node.entries) > 2:
            raise self.refuse(node, "has a weight that is computed or not in the state dict")
        if node.op != "linear" and node["groups"] != 1:
            raise self.refuse(
                node, "is a grouped convolution: its units do not read all units before"
            )
        if node.op == "linear" and len(before) != 2:
            shape = ["N", *map(str, before[1:])]
            raise self.refuse(node, f"takes values of shape {shape}, not [N, features]")
        if not self.widths:
            self.widths.append(weight.shape[1])
        self._affine = node

    def _end(self) -> None:
        """Closes the layer that began with the last affine map."""
        node, steps = self._affine, self._steps
        self._affine, self._steps = None, []
        if node is None:
            return
        used = self._used()
        if any(key in used for key in node.entries):
            raise self.refuse(node, "shares its weight with another layer")
        weight = self.state[node.entries[0]]
        norms = [_norm(step) for step in steps if step.op == "batch_norm"]
        activations = [step.op for step in steps if step.op in ACTIVATIONS]
        if len(activations) > 1:
            raise self.refuse(node, f"is followed by two activations: {', '.join(activations)}")
        layer = AffineLayer(
            index=len(self.layers) + 1,
            kind=node.op,
            weight=node.entries[0],
            bias=node.entries[1] if len(node.entries) > 1 else None,
            norm=norms[0] if norms else None,
            affine=node,
            steps=tuple(steps),
            activation=activations[0] if activations else "identity",
            units=weight.shape[0],
            block=weight.shape[1] // self.widths[-1] if node.op == "linear" else 1,
            kernel=tuple(weight.shape[2:]),
        )
        self.layers.append(layer)
        self.widths.append(layer.units)

    def _used(self) -> set[str]:
        """Collects the keys of the parameters and buffers of the layers so far."""
        return set().union(*(layer.incoming() for layer in self.layers))

    def chain(self) -> LayerChain:
        """Closes the last layer and returns the chain."""
        self._end()
        if not self.layers:
            raise _refusal(self.name, "it has no linear layer")
        self._check_last(self.layers[-1])
        used = self._used()
        others = tuple(key for key in self.state if key not in used)
        fixed = FixedInputs(tuple(self.fixed), self.constants)
        if used.intersection(fixed.keys):
            raise _refusal(self.name, "a tensor before the first layer is one of a layer, too")
        return LayerChain(tuple(self.layers), tuple(self.widths), self.name, fixed, others)

    def _check_last(self, last: AffineLayer) -> None:
        """Raises unless the outputs are linear in the last layer's weights, a number for each."""
        odd = [step.op for step in last.steps if step.op not in (*AVERAGES, "flatten")]
        what = f"followed by {odd[0]}" if odd else ""
        if last.kind == "linear" and last.steps:
            what = f"followed by {last.steps[-1].op}"
        elif last.kind != "linear" and not what:
            shape = list((last.steps or (last.affine,))[-1].shape[1:])
            if shape != [last.units]:
                what = f"a convolution whose outputs have shape {['N', *map(str, shape)]}"
        if what:
            raise _refusal(
                self.name,
                f"its last layer, {last.weight}, is {what}; the output must be that of a linear "
                "layer, or of a convolution whose channels are averaged over all pixels",
            )


def _keeps_shape(node: Node, before: tuple[Any, ...]) -> bool:
    """Whether the value of a node has the shape of that before it."""
    return list(map(str, node.shape)) == list(map(str, before))


def _norm(node: Node) -> Norm:
    def key(name: str) -> str | None:
        leaf = node[name]
        return None if leaf is None else node.entries[leaf.index]

    return Norm(key("weight"), key("bias"), key("mean"), key("var"), float(node["eps"]))


def block_rows(chain: LayerChain, sample: Tensor, budget: int = _PLAIN_BUDGET) -> int:
    """Returns the number of rows whose widest value fits a budget of bytes."""
    widest = max(1, sample[:1].numel())
    for layer in chain.layers:
        size = math.prod(d for d in layer.affine.shape[1:] if not isinstance(d, Size))
        widest = max(widest, size)
    bytes_per_number = 4
    return max(_FEWEST_ROWS, min(_MOST_ROWS, budget // (bytes_per_number * widest)))
