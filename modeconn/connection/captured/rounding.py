"""Bounds how far rounding can move the outputs of a captured graph, by its operations' norms.

With the Euclidean norm of a row's input, |x|, every value of a node is at most a |x| + b, and so is
its error in unit roundoffs, with other a and b: an operation lengthens both by its Lipschitz
constant and adds its own rounding, at most γ_n (|W| |h| + |b|) of a product of n terms (Higham
2002, section 3.1). The numbers a and b depend on the weights alone, so that bounding all rows costs
their norms. The bounds are products of norms: of use in float64, and for few layers in float32.

Between the ends of a swing the bound is convex in t, and on a rewrite it does not change, as in
chains (rounding.py).
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeconn.capture.graph import Entry, Graph, In, Node
from modeconn.connection import lipschitz
from modeconn.connection.activation_bounds import bounds_of, pooled_numbers
from modeconn.connection.captured.liveness import Liveness, live_part
from modeconn.connection.captured.segments import tensor_of
from modeconn.connection.layer_chain import ACTIVATIONS, AVERAGES
from modeconn.connection.local_rounding import BESIDE, OF_ACTIVATION, OF_NORM, UNIT_ROUNDOFF
from modeconn.connection.rounding import Sensitivity

State = Mapping[str, Tensor]

# Operations that put numbers elsewhere, or leave some out.
_MOVES = frozenset(
    "flatten reshape view squeeze unsqueeze permute transpose t movedim flip contiguous clone "
    "alias detach dropout feature_dropout identity slice select".split()
)
_PRODUCTS = ("linear", "conv1d", "conv2d")
_MAXIMA = ("max_pool1d", "max_pool2d")
# A bound above this, for inputs of mean square 1 in float64, says nothing of a loss.
_USELESS = 1e-3


class _Unknown(Exception):
    """Raised at an operation whose rounding is not known."""


@dataclass(frozen=True, eq=False)
class _Norms:
    """Bounds of a node's value and of its error, as (a, b): at most a |x| + b."""

    value: np.ndarray
    error: np.ndarray

    def through(self, slope: float, own: np.ndarray, value: np.ndarray) -> _Norms:
        """Bounds of an operation's value, its Lipschitz constant and own error given."""
        return _Norms(value, slope * self.error + own)


_ONE, _LONE = np.array([1.0, 0.0]), np.array([0.0, 1.0])


class GraphRounding:
    """The bounds of a path of one graph.

    Args:
        groups: by breakpoint the number of its function: rewrites join equal ones.
        bounds: of the outputs' errors by function, as (a, b).
        classes: the number of outputs.
    """

    def __init__(self, groups: Sequence[int], bounds: Sequence[np.ndarray], classes: int) -> None:
        self._groups, self._bounds, self._classes = groups, bounds, classes

    def of_rows(self, x: Tensor) -> Sequence[Sensitivity]:
        """Returns a bound for each breakpoint; those of its ends bound a segment.

        Args:
            x: inputs [N, …].
        """
        lengths = lipschitz.lengths(x.double())
        found = []
        for a, b in self._bounds:
            of_rows = (float(a) * lengths + float(b))[:, None]
            found.append(of_rows.expand(-1, self._classes).contiguous())
        return [Sensitivity(found[group]) for group in self._groups]


def graph_rounding(
    graph: Graph,
    points: Sequence[State],
    live: Callable[[State], Liveness],
    groups: Sequence[int],
) -> GraphRounding | None:
    """Returns the bounds of a path; None where some operation is not known, or they say nothing.

    Args:
        graph: of a network whose output is one tensor [N, classes].
        points: the breakpoints. live: derives what is live at one.
        groups: by breakpoint the number of its function.
    """
    known: dict[bytes, tuple[float, float]] = {}
    (output,) = graph.outputs()
    bounds: list[np.ndarray] = []
    size = math.sqrt(sum(node.numel() for node in graph.nodes if node.op == "input"))
    for k, group in enumerate(groups):
        if group < len(bounds):
            continue
        try:
            a, b = _Walk(graph, points[k], live(points[k]), known).error(output)
        except _Unknown:
            return None
        if not (a * size + b) * UNIT_ROUNDOFF[torch.float64] <= _USELESS:
            return None
        bounds.append(np.array([a, b]))
    classes = graph.nodes[output].shape[1]
    return GraphRounding(groups, bounds, classes) if isinstance(classes, int) else None


class _Walk:
    """Goes up a graph with the weights of one network.

    Args:
        known: norms of weights and of their absolute values, by their content.
    """

    def __init__(
        self,
        graph: Graph,
        state: State,
        live: Liveness,
        known: dict[bytes, tuple[float, float]],
    ) -> None:
        self._graph, self._state, self._live, self._known = graph, state, live, known
        self._found: dict[int, _Norms] = {}
        readers: Counter[int] = Counter()
        for node in graph.nodes:
            if node.id in live.cuts:
                readers.update(node.inputs)
        # Norms that alone read a product scale its rows.
        self._scaled = {
            node.inputs[0]
            for node in graph.nodes
            if node.op == "batch_norm"
            and len(node.inputs) == 1
            and readers[node.inputs[0]] == 1
            and _has_rows(graph.nodes[node.inputs[0]])
        }

    def error(self, output: int) -> np.ndarray:
        """Returns the bound of the output's error.

        Raises:
            _Unknown: there is none.
        """
        for node in self._graph.nodes:
            if node.op == "input":
                self._found[node.id] = _Norms(_ONE, _ONE)
            elif node.id in self._live.units and node.id not in self._scaled:
                self._found[node.id] = self._bound(node)
        return self._found[output].error

    def _bound(self, node: Node) -> _Norms:
        inputs = [self._found.get(i) for i in node.inputs]
        if node.op in _PRODUCTS:
            return self._of_product(node, None)
        if node.op == "batch_norm":
            before = self._graph.nodes[node.inputs[0]]
            if before.id in self._scaled:
                return self._of_product(before, node)
            return self._of_norm(node)
        if node.op == "add":
            shapes = [self._graph.nodes[i].shape for i in node.inputs]
            return _of_sum(node, [list(map(str, shape)) for shape in shapes], inputs)
        if node.op == "cat":
            return _side_by_side(node, inputs)
        if len(inputs) != 1 or inputs[0] is None or node.entries:
            raise _Unknown
        return _of_one(node, self._graph.nodes[node.inputs[0]], inputs[0])

    def _entry(self, node: Node, name: str) -> Tensor | None:
        """The live part of a parameter or buffer, in float64."""
        leaf = node.arguments.get(name)
        if leaf is None:
            return None
        if not isinstance(leaf, Entry):
            raise _Unknown
        cut = self._live.cuts[node.id][leaf.index]
        whole = tensor_of(self._graph, self._state, node.entries[leaf.index])
        return live_part(whole, cut).detach().double()

    def _scale_and_shift(self, norm: Node) -> tuple[Tensor, Tensor]:
        """A norm as a factor and the size of what it adds, by channel."""
        var, mean = self._entry(norm, "var"), self._entry(norm, "mean")
        if var is None or mean is None:
            raise _Unknown
        scale = 1 / (var + norm["eps"]).sqrt()
        weight, bias = self._entry(norm, "weight"), self._entry(norm, "bias")
        scale = scale if weight is None else scale * weight
        size = (mean * scale).abs()
        return scale, size if bias is None else size + bias.abs()

    def _of_norm(self, norm: Node) -> _Norms:
        scale, size = self._scale_and_shift(norm)
        before = self._found[norm.inputs[0]]
        slope = float(scale.abs().max()) if scale.numel() else 0.0
        shift = float(size.norm()) * math.sqrt(_pixels(norm, 1))
        value = slope * before.value + shift * _LONE
        return before.through(slope, OF_NORM * value, value)

    def _of_product(self, node: Node, norm: Node | None) -> _Norms:
        """Bounds a linear layer or convolution, with the norm behind it if there is one."""
        if node["input"] != In(0):
            raise _Unknown
        weight, bias = self._entry(node, "weight"), self._entry(node, "bias")
        if weight is None:
            raise _Unknown
        size = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.abs()
        terms = weight[0].numel() + BESIDE if len(weight) else BESIDE
        if norm is not None:
            scale, more = self._scale_and_shift(norm)
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            size, terms = size.to(scale) * scale.abs() + more, terms + OF_NORM
        slope, absolute = self._norms_of(weight, node)
        # A product whose weights are all zero reads nothing.
        before = self._found.get(node.inputs[0], _Norms(0 * _ONE, 0 * _ONE))
        axis = 1 if node.op != "linear" else len(node.shape) - 1
        shift = float(size.norm()) * math.sqrt(_pixels(node, axis)) * _LONE
        own = terms * (absolute * before.value + shift)
        return before.through(slope, own, slope * before.value + shift)

    def _norms_of(self, weight: Tensor, node: Node) -> tuple[float, float]:
        """The norms of a product and of its absolute values."""
        content = weight.cpu().contiguous().numpy()
        key = hashlib.sha256(f"{node.op}{content.shape}".encode() + content.tobytes()).digest()
        if key not in self._known:
            if node.op == "linear":
                norm_of = lipschitz.of_matrix
            elif node["groups"] == 1:
                norm_of = lipschitz.of_convolution
            else:
                norm_of = _of_groups
            self._known[key] = norm_of(weight), norm_of(weight.abs())
        return self._known[key]


def _of_groups(weight: Tensor) -> float:
    """Bounds a grouped convolution by the sums of its rows' magnitudes (Young's inequality)."""
    sums = weight.abs().flatten(1).sum(1)
    return float(sums.norm()) * (1 + 1e-9)


def _pixels(node: Node, axis: int) -> float:
    """Numbers per row of a node's value that one of its channels has."""
    channels = node.shape[axis]
    if not isinstance(channels, int):
        raise _Unknown
    return node.numel() / max(1, channels)


def _has_rows(node: Node) -> bool:
    """Whether it is a product whose rows are the channels of a norm behind it."""
    return node.op in _PRODUCTS and (node.op != "linear" or len(node.shape) == 2)


def _of_sum(node: Node, shapes: Sequence[list[str]], inputs: Sequence[_Norms | None]) -> _Norms:
    """Bounds the sum of two values of one shape."""
    plain = {node["self"], node["other"]} == {In(0), In(1)}
    alike = all(shape == list(map(str, node.shape)) for shape in shapes)
    known = [each for each in inputs if each is not None]
    if not (plain and alike and len(known) == 2 and node.arguments.get("alpha", 1) == 1):
        raise _Unknown
    value = known[0].value + known[1].value
    return _Norms(value, known[0].error + known[1].error + value)


def _side_by_side(node: Node, inputs: Sequence[_Norms | None]) -> _Norms:
    """Bounds several values side by side, of which dead ones are left out."""
    if list(node["tensors"]) != [In(k) for k in range(len(inputs))]:
        raise _Unknown
    found = _Norms(0 * _ONE, 0 * _ONE)
    for each in inputs:
        if each is not None:
            found = _Norms(found.value + each.value, found.error + each.error)
    return found


def _of_one(node: Node, before: Node, given: _Norms) -> _Norms:
    """Bounds an operation on one value, without weights."""
    if node.op in _MOVES:
        return given
    if node.op in _MAXIMA:
        return given.through(
            lipschitz.of_step(node), 0 * _ONE, lipschitz.of_step(node) * given.value
        )
    if node.op in AVERAGES or node.op == "mean":
        slope, count = _of_average(node, before)
        return given.through(slope, (count + 2) * slope * given.value, slope * given.value)
    bounds = bounds_of(node) if node.op in ACTIVATIONS else None
    if bounds is None:
        raise _Unknown
    numbers = math.sqrt(node.numel())
    value = bounds.factor * given.value + bounds.offset * numbers * _LONE
    own = 0.0 if bounds.exact else OF_ACTIVATION
    return given.through(bounds.slope, own * (given.value + value + numbers * _LONE), value)


def _of_average(node: Node, before: Node) -> tuple[float, float]:
    """The Lipschitz constant of an average, and how many numbers it is of."""
    count = before.numel() / max(1.0, node.numel())
    if node.op == "mean":
        if node.arguments.get("dtype") is not None:
            raise _Unknown
        return 1 / math.sqrt(count), count
    if node.op.startswith("adaptive"):
        whole = all(size == 1 for size in node.shape[2:])
        return (1 / math.sqrt(count) if whole else lipschitz.of_step(node)), before.numel()
    return lipschitz.of_step(node), pooled_numbers(node)
