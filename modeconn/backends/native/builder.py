"""Steps of a segment, one after the other, as a graph of the engine's steps."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np

from modeconn.backends.activations import IDENTITY, Activation, activation_of
from modeconn.backends.native.layers import Layer, StepGraph
from modeconn.backends.native.lowering import (
    DEPTH_PER_TERM,
    affine,
    begin_with_layer,
    features_axis,
    folds,
    lower,
)
from modeconn.backends.node_reading import (
    LARGEST_FOLDED,
    of_dtype,
    operands,
    passes_through,
    unsupported,
)
from modeconn.capture.graph import In, Node, Size
from modeconn.plan.program import Combination, Program, Segment, Varying, VaryingStep
from modeconn.plan.units import Shape, counts

# Operations over the last axis: a subgraph that begins with one has its features there.
_OF_FEATURES = frozenset(("linear", "layer_norm"))
# What else it takes then: what names no axis, or the last one.
_OF_PIXELS = _OF_FEATURES | set("add sub mul div neg reshape clone alias detach dropout".split())
Operand = Combination | int
_VALUES = "values that are images [N, C, H, W] or rows, all of the same samples"


class Reads:
    """Counts how often the values of a segment's steps are read, and names the last step that does.

    An output of the segment counts as a read behind all of its steps.
    """

    def __init__(self, segment: Segment) -> None:
        self.counts: Counter[int] = Counter()
        self.last: dict[int, int] = {}
        for index, step in enumerate(segment.steps):
            for i in step.inputs:
                if isinstance(i, int):
                    self.counts[i] += 1
                    self.last[i] = index
        for form in segment.outputs.values():
            if isinstance(form, Varying):
                self.counts[form.step] += 1
                self.last[form.step] = len(segment.steps)


class Builder:
    """Turns steps from `start` on into a step graph.

    Args:
        start: the first of the steps; the others are added in their order.
        backend: whose kernels run the graph. Those of "cuda" have fewer activations, and norms
            behind layers alone.
        reads: those of the segment, where they are known.

    Attributes:
        steps: the graph so far.
    """

    def __init__(
        self,
        program: Program,
        segment: Segment,
        start: int = 0,
        backend: str = "native",
        reads: Reads | None = None,
    ) -> None:
        self.program, self.segment, self.start = program, segment, start
        self.steps = StepGraph()
        self._backend = backend
        # Without a step for norms, every norm must become part of a layer.
        self._depth: float = math.inf if backend == "cuda" else DEPTH_PER_TERM
        # Whether the graph begins with images; None: it has not begun.
        self._images: bool | None = None
        # step → the layer that gives its value, -1 for the graph's own terms
        self._place: dict[int, int] = {}
        # step → whether only the next step that asks for it reads it
        self._alone: dict[int, bool] = {}
        self._sources: dict[object, int] = {}
        # of rows of features, whatever axes they have
        self._rows: tuple[int, ...] | None = None
        self._reads = reads or Reads(segment)
        # the last step that reads a value of those before the latest one
        self._open = -1

    def ends(self, last: int) -> bool:
        """Whether the step added last is the only output of the steps so far."""
        return self._open <= last and self._place[last] == len(self.steps.layers) - 1

    @property
    def never_ends(self) -> bool:
        """Whether an output of the segment is not the last step: so no run of steps ends."""
        return self._open >= len(self.segment.steps)

    def add(self, index: int) -> None:
        """Adds a step.

        Raises:
            Unsupported: the engine does not have it. The builder is then of no use.
        """
        if index > self.start:
            self._open = max(self._open, self._reads.last.get(index - 1, -1))
        step = self.segment.steps[index]
        if index == self.start:
            self.steps.features_last = len(step.node.shape) == 4 and step.node.op in _OF_FEATURES
        node = self._seen(step.node)
        if node is not step.node:
            step = replace(step, node=node)
            if node.op not in _OF_PIXELS and activation_of(node, self._backend) is None:
                raise unsupported(node, "layers, sums and products of pixels [N, H, W, C]")
        if not node.batched or not self._fits(node):
            raise unsupported(node, _VALUES)
        if not all(of_dtype(entry, self.program.dtype) for entry in step.entries):
            raise unsupported(node, "constants of the dtype that it computes in")
        if step.combine is not None:
            self._put(index, self._source(StepGraph(step.combine.terms), node))
            return
        joins = {"add": self._add_sum, "mul": self._add_product, "cat": self._add_concatenation}
        if node.op in joins and len(step.inputs) > 1:
            joins[node.op](index, step)
            return
        if len(step.inputs) != 1:
            raise unsupported(node, "add, mul and cat of several values, and steps of one value")
        place, alone = self._read_alone(step.inputs[0])
        before = self._nodes(step.inputs[0])[0].shape
        activation = activation_of(node, self._backend)
        if passes_through(node, before) or self._regroups(node, before):
            self._put(index, place, alone)
        elif node.op == "batch_norm":
            self._put(index, self._add_norm(step, place, alone))
        elif activation is not None:
            self._put(index, self._activate(place, alone, activation))
        else:
            self._add_layers(index, lower(step, len(self.segment.point_indices), before), place)

    def _add_layers(self, index: int, layers: list[Layer], place: int) -> None:
        for layer in layers:
            if layer.op == "flatten" and any(other.op == "flatten" for other in self.steps.layers):
                raise unsupported(self.segment.steps[index].node, "one flatten of images")
            layer.reads = place
            place = self._append(layer)
        self._put(index, place)

    def _add_norm(self, step: VaryingStep, place: int, alone: bool) -> int:
        """A batch norm with given statistics: part of the layer before it, or a step of its own."""
        if len(step.node.shape) == 3:
            raise unsupported(step.node, "batch_norm of images [N, C, H, W] or rows [N, C]")
        if place < 0 and alone and begin_with_layer(self.program, self.steps, self._depth):
            place = 0
        norm = affine(step, len(self.segment.point_indices))
        large = bool((np.abs(norm[0]) > LARGEST_FOLDED).any())
        if place < 0 or not alone or large or not folds(self.steps.layers[place]):
            place = self._append(Layer(op="affine", reads=place))
        self.steps.layers[place].norm = norm
        return place

    def _activate(self, place: int, alone: bool, activation: Activation) -> int:
        """An activation: of the layer before it, if nothing else reads that, or on its own."""
        before = self.steps if place < 0 else self.steps.layers[place]
        activates = isinstance(before, StepGraph) or before.activates
        if not (alone and activates and before.activation == IDENTITY):
            place = self._append(Layer(op="add", inputs=(place,)))
            before = self.steps.layers[place]
        before.activation = activation
        return place

    def _add_sum(self, index: int, step: VaryingStep) -> None:
        """A sum of two values: part of the later layer, if nothing else reads it, or on its own."""
        node = step.node
        shapes = [list(map(str, self.program.graph.nodes[i].shape)) for i in node.inputs]
        if node.arguments.get("alpha", 1) != 1:
            raise unsupported(node, "add without alpha", "alpha")
        plain = operands(node) in ((In(0), In(1)), (In(1), In(0)))
        if not plain or shapes[0] != shapes[1]:
            raise unsupported(node, "add of two values of one shape")
        places = [self._read(value) for value in step.inputs]
        later, other = max(places), min(places)
        owner = step.inputs[places.index(later)]
        layer = self.steps.layers[later] if later >= 0 else Layer(op="terms")
        alone = isinstance(owner, int) and self._alone.get(owner, False)
        if layer.sums and layer.bare and other < later and alone:
            layer.adds = other
        else:
            later = self._append(Layer(op="add", inputs=tuple(places)))
        self._put(index, later)

    def _add_product(self, index: int, step: VaryingStep) -> None:
        """The product of two values, of which one may have a single pixel: a gate of channels."""
        node = step.node
        shape = list(map(str, node.shape))
        shapes = [list(map(str, self._nodes(value)[0].shape)) for value in step.inputs]
        gate = [*shape[:2], "1", "1"] if len(shape) == 4 else shape
        if shape not in shapes or not all(other in (shape, gate) for other in shapes):
            raise unsupported(node, "mul of two values of one shape, or with one per channel")
        values = step.inputs if shapes[0] == shape else step.inputs[::-1]
        places = [self._read(value) for value in values]
        self._put(index, self._append(Layer(op="multiply", inputs=tuple(places))))

    def _add_concatenation(self, index: int, step: VaryingStep) -> None:
        """The channels of several values."""
        node = step.node
        inputs = tuple(map(In, range(len(step.inputs))))
        channels = node["dim"] % len(node.shape) == features_axis(node)
        if tuple(node["tensors"]) != inputs or not channels:
            raise unsupported(node, "cat of channels", "dim")
        places = [self._read(value) for value in step.inputs]
        self._put(index, self._append(Layer(op="concat", inputs=tuple(places))))

    def _regroups(self, node: Node, before: Shape) -> bool:
        """Whether a view has the same rows of features in other axes: [N, T, C] and [N·T, C]."""
        axes = max(len(before), len(node.shape))
        view = node.op in ("reshape", "squeeze", "unsqueeze") and self._backend == "native"
        return view and axes < 4 and before[-1] == node.shape[-1]

    def _put(self, index: int, place: int, alone: bool = True) -> None:
        self._place[index], self._alone[index] = place, alone and self._reads.counts[index] == 1

    def _append(self, layer: Layer) -> int:
        self.steps.layers.append(layer)
        return len(self.steps.layers) - 1

    def _nodes(self, value: Operand) -> list[Node]:
        """The nodes that give a value: a step's, or those of shared values that are combined."""
        if isinstance(value, int):
            return [self._seen(self.segment.steps[value].node)]
        return [self._seen(self.program.shared[term.value].node) for term in value.terms]

    def _seen(self, node: Node) -> Node:
        """A node as the engine is told of it: pixels [N, H, W, C] are rows where C comes last."""
        if not self.steps.features_last or len(node.shape) != 4:
            return node
        first, height, width, features = node.shape
        if isinstance(height, Size) or isinstance(width, Size):
            return node
        return replace(node, shape=(first, height * width, features))

    def _read(self, value: Operand) -> int:
        """The layer whose value a step reads, -1 for the graph's own terms.

        Raises:
            Unsupported: the value is neither rows nor images.
        """
        if isinstance(value, int) and value in self._place:
            return self._place[value]
        nodes = self._nodes(value)
        for node in nodes:
            if not node.batched or not self._fits(node):
                raise unsupported(node, _VALUES)
        key = value if isinstance(value, int) else id(value)
        if key not in self._sources:
            if isinstance(value, int):
                given = StepGraph(step=value)
            else:
                given = StepGraph(value.terms)
            self._sources[key] = self._source(given, nodes[0])
        return self._sources[key]

    def _read_alone(self, value: Operand) -> tuple[int, bool]:
        """The layer whose value a step reads, and whether no other step reads it."""
        place = self._read(value)
        return place, isinstance(value, int) and self._alone.get(value, False)

    def _source(self, given: StepGraph, node: Node) -> int:
        """Begins the graph with some terms or an earlier step's value, or takes them in later."""
        image = len(node.shape) == 4
        if given.step is not None:
            self.steps.numel += self.segment.steps[given.step].numel
        else:
            self.steps.numel += sum(self.program.shared[t.value].numel for t in given.terms)
        if self._images is None:
            self.steps.terms, self.steps.step, self._images = given.terms, given.step, image
            return -1
        if image and not self._images:
            raise unsupported(node, "no images where the first values are rows")
        return self._append(Layer(op="terms", terms=given.terms, step=given.step))

    def _fits(self, node: Node) -> bool:
        """Whether a value is images [N, C, H, W] or rows, and as many as the others."""
        axes = len(node.shape)
        if axes < 2 or axes > 4:
            return False
        if any(isinstance(size, Size) or size == 0 for size in node.shape[1:]):
            return False
        rows = counts(node.shape, range(1 if axes == 4 else axes - 1))
        if self._rows is None:
            self._rows = rows
        return rows == self._rows
