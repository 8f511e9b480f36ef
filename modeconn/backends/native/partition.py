"""Which steps of a segment the C++ engine can run together, and how they look to it.

A region is a run of steps that the engine knows, of which only the last one's value is needed
outside. Its values are images and rows, in any order of reading: a value may be read twice and
added later, as in residual networks. Where all of a segment's steps are one region, the engine runs
the segment down to the sums of the head; any others are run one by one between the steps that are
left to the reference backend.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from modeconn.backends.native.layers import Chain, Layer, Stage
from modeconn.backends.native.lowering import (
    DEPTH_PER_TERM,
    activation_of,
    affine,
    begin_with_layer,
    engine_activation,
    features_axis,
    folds,
    passes_through,
    step_layers,
)
from modeconn.capture.graph import In, Node
from modeconn.capture.ops import mkl_falls_behind
from modeconn.plan.program import Combination, Program, Segment, Varying, VaryingStep

# "auto" leaves a region to the reference backend where it does fewer operations per number that it
# takes or gives: bringing them into the engine's layout and back then costs more than is saved.
_WORTH = 64.0
# The same where it has no convolution: PyTorch's products of matrices are as fast as the engine's,
# unless MKL leaves out instructions that the CPU has, and only the values between the layers stay
# nearer.
_WORTH_OF_LINEARS = 2048.0
# And where it has fewer layers with weights than this, or less than this share of its segment's
# arithmetic.
_LAYERS, _SHARE = 2, 0.05


@dataclass
class Region:
    """Steps first … last of a segment as the engine takes them; `chain` ends with the value of the last."""

    first: int
    last: int
    chain: Chain

    def pays(self, segment: Segment) -> bool:
        """Whether "auto" takes it: the cost model, of the plan's counts alone."""
        steps = segment.steps[self.first : self.last + 1]
        flops = sum(step.flops for step in steps)
        layers = sum(layer.coefficients is not None for layer in self.chain.layers)
        faster = mkl_falls_behind() or any(step.node.op == "conv2d" for step in steps)
        worth = flops >= (_WORTH if faster else _WORTH_OF_LINEARS) * (
            self.chain.numel + steps[-1].numel
        )
        return layers >= _LAYERS and worth and flops >= _SHARE * segment.flops


def find_region(program: Program, segment: Segment, plain: bool = False) -> Region | str:
    """All steps of a segment as one region that ends in [N, classes], or why they are none; `plain`: as for `Builder`."""
    output = program.graph.tensor_output
    if output is None:
        return "the network returns more than one tensor"
    if len(program.graph.nodes[output].shape) != 2:
        return "the network's output is not [N, classes]"
    form = segment.outputs[output]
    if isinstance(form, Combination):
        return Region(0, -1, Chain(form.terms))
    builder = Builder(program, segment, 0, plain)
    for index in range(len(segment.steps)):
        reason = builder.add(index)
        if reason:
            return f"{_where(segment.steps[index].node)} {reason}"
    last = len(segment.steps) - 1
    if not isinstance(form, Varying) or not builder.ends(last):
        return "the output is not the last step"
    return Region(0, last, builder.chain)


def find_chain(program: Program, segment: Segment) -> Chain | str:
    """A segment as a plain chain, in which each layer reads the one before it and nothing else; or why it is none."""
    region = find_region(program, segment, plain=True)
    if isinstance(region, Region) and not region.chain.straight:
        return "some step does not follow the step before it"
    return region if isinstance(region, str) else region.chain


def find_regions(program: Program, segment: Segment) -> list[Region]:
    """The longest regions of a segment's steps, each with a layer that has weights, in order."""
    regions: list[Region] = []
    start = 0
    while start < len(segment.steps):
        found = _longest(program, segment, start)
        if found:
            regions.append(found)
        start = found.last + 1 if found else start + 1
    return regions


def _longest(program: Program, segment: Segment, start: int) -> Region | None:
    builder, ends = Builder(program, segment, start), []
    for index in range(start, len(segment.steps)):
        if builder.add(index):
            break
        if builder.ends(index):
            ends.append(index)
    for last in reversed(ends):
        builder = Builder(program, segment, start)
        for index in range(start, last + 1):
            builder.add(index)
        if any(layer.coefficients is not None for layer in builder.chain.layers):
            return Region(start, last, builder.chain)
    return None


class Builder:
    """Turns steps from `start` on into a chain, one after the other.

    Args:
        plain: for a kernel that has no activations and norms but those of `activation_of` and
            behind layers.
    """

    def __init__(self, program: Program, segment: Segment, start: int, plain: bool = False) -> None:
        self.program, self.segment, self.start = program, segment, start
        self._depth: float = math.inf if plain else DEPTH_PER_TERM
        self._activation = activation_of if plain else engine_activation
        self.chain = Chain(())
        # whether the chain begins with images; None: it has not begun
        self._images: bool | None = None
        # step → the layer that gives its value, -1 for the chain's own terms
        self._place: dict[int, int] = {}
        # step → whether only the next step that asks for it reads it
        self._alone: dict[int, bool] = {}
        self._sources: dict[object, int] = {}
        self._shape: tuple[str, ...] | None = None  # what all rows have in front of their features
        self._reads = Counter(
            i for step in segment.steps for i in step.inputs if isinstance(i, int)
        )
        self._reads.update(
            form.step for form in segment.outputs.values() if isinstance(form, Varying)
        )

    def ends(self, last: int) -> bool:
        """Whether, of the steps so far, nobody outside needs another value than that of the last."""
        inside: Counter[int] = Counter()
        for step in self.segment.steps[self.start : last + 1]:
            inside.update(i for i in step.inputs if isinstance(i, int))
        whole = all(inside[i] == self._reads[i] for i in range(self.start, last))
        return whole and self._place[last] == len(self.chain.layers) - 1

    def add(self, index: int) -> str:
        """Add a step; why it cannot be added, if so."""
        step = self.segment.steps[index]
        node = step.node
        if not node.batched or not self._fits(node):
            return "is not part of a chain of linear layers and convolutions"
        if step.combine is not None:
            reason, place = self._source(Chain(step.combine.terms), len(node.shape) == 4)
            if not reason:
                self._put(index, place)
            return reason
        joins = {"add": self._add_sum, "mul": self._add_product, "cat": self._add_concatenation}
        if node.op in joins and len(step.inputs) > 1:
            return joins[node.op](index, step)
        if len(step.inputs) != 1:
            return "does not follow the step before it"
        reason, place, alone = self._read_alone(step.inputs[0])
        if reason:
            return reason
        before = self._nodes(step.inputs[0])[0].shape
        if passes_through(node, before):
            self._put(index, place, alone)
            return ""
        points = len(self.segment.point_indices)
        if node.op == "batch_norm":
            if len(node.shape) == 3:
                return "normalises the second of three axes"
            if place < 0 and alone and begin_with_layer(self.program, self.chain, self._depth):
                place = 0
            if place < 0 or not alone or not folds(self.chain.layers[place]):
                place = self._append(Layer(op="affine", reads=place))
            self.chain.layers[place].norm = affine(step, points)
            self._put(index, place)
            return ""
        activation = self._activation(node)
        if activation is not None:
            self._put(index, self._activate(place, alone, activation))
            return ""
        layers = step_layers(step, points, before)
        return layers if isinstance(layers, str) else self._add_layers(index, layers, place)

    def _add_layers(self, index: int, layers: list[Layer], place: int) -> str:
        for layer in layers:
            if layer.op == "flatten" and any(other.op == "flatten" for other in self.chain.layers):
                return "flattens images for a second time"
            layer.reads = place
            place = self._append(layer)
        self._put(index, place)
        return ""

    def _activate(self, place: int, alone: bool, activation: Stage) -> int:
        """An activation behind a value: with what gives it, if nobody else needs that, or on its own."""
        before = self.chain.start if place < 0 else self.chain.layers[place]
        activates = before.activates if isinstance(before, Layer) else True
        if not (alone and activates and before.activation == "identity"):
            place = self._append(Layer(op="add", inputs=(place,)))
            before = self.chain.layers[place]
        before.activation, before.slope = activation.activation, activation.slope
        return place

    def _add_sum(self, index: int, step: VaryingStep) -> str:
        """A sum of two values: with the later of them, if that is a layer's and nobody else needs it, or on its own."""
        node = step.node
        shapes = [list(map(str, self.program.graph.nodes[i].shape)) for i in node.inputs]
        if (
            node.kwargs
            or node.args not in ((In(0), In(1)), (In(1), In(0)))
            or shapes[0] != shapes[1]
        ):
            return "is no plain sum of two values of one shape"
        reason, places = self._read_all(step.inputs)
        if reason:
            return reason
        later, other = max(places), min(places)
        owner = step.inputs[places.index(later)]
        layer = self.chain.layers[later] if later >= 0 else None
        free = (
            layer is not None
            and layer.sums
            and layer.activation == "identity"
            and layer.adds is None
        )
        if (
            layer is not None
            and free
            and other < later
            and isinstance(owner, int)
            and self._alone.get(owner, False)
        ):
            layer.adds = other
        else:
            later = self._append(Layer(op="add", inputs=tuple(places)))
        self._put(index, later)
        return ""

    def _add_product(self, index: int, step: VaryingStep) -> str:
        """Two values multiplied, of which one may have a single pixel, as gates of channels have."""
        shape = [str(size) for size in step.node.shape]
        shapes = [[str(size) for size in self._nodes(value)[0].shape] for value in step.inputs]
        gate = [*shape[:2], "1", "1"] if len(shape) == 4 else shape
        values = step.inputs if shapes[0] == shape else step.inputs[::-1]
        if (
            step.node.kwargs
            or shape not in shapes
            or not all(other in (shape, gate) for other in shapes)
        ):
            return "is no product of two values of one shape, or with one for each channel"
        reason, places = self._read_all(values)
        if not reason:
            self._put(index, self._append(Layer(op="multiply", inputs=tuple(places))))
        return reason

    def _add_concatenation(self, index: int, step: VaryingStep) -> str:
        """The channels of several values."""
        values, *axis = step.node.args
        axes = len(step.node.shape)
        given = axis[0] if axis else step.node.kwargs.get("dim", 0)
        if tuple(values) != tuple(
            map(In, range(len(step.inputs)))
        ) or given % axes != features_axis(step.node):
            return "puts other things side by side than channels"
        reason, places = self._read_all(step.inputs)
        if not reason:
            self._put(index, self._append(Layer(op="concat", inputs=tuple(places))))
        return reason

    def _put(self, index: int, place: int, alone: bool = True) -> None:
        self._place[index], self._alone[index] = place, alone and self._reads[index] == 1

    def _append(self, layer: Layer) -> int:
        self.chain.layers.append(layer)
        return len(self.chain.layers) - 1

    def _nodes(self, value: Combination | int) -> list[Node]:
        """What gives a value: a step, or the shared values that are combined."""
        shared = self.program.shared
        return (
            [self.segment.steps[value].node]
            if isinstance(value, int)
            else [shared[t.value].node for t in value.terms]
        )

    def _read(self, value: Combination | int) -> tuple[str, int]:
        """Where the engine has what a step reads; or why it cannot have it."""
        if isinstance(value, int) and value in self._place:
            return "", self._place[value]
        nodes = self._nodes(value)
        if not all(node.batched and self._fits(node) for node in nodes):
            return "reads what is neither rows nor images", -1
        key = value if isinstance(value, int) else id(value)
        if key not in self._sources:
            given = Chain((), step=value) if isinstance(value, int) else Chain(value.terms)
            reason, place = self._source(given, len(nodes[0].shape) == 4)
            if reason:
                return reason, -1
            self._sources[key] = place
        return "", self._sources[key]

    def _read_alone(self, value: Combination | int) -> tuple[str, int, bool]:
        """The same, and whether no other step reads it."""
        reason, place = self._read(value)
        return reason, place, isinstance(value, int) and self._alone.get(value, False)

    def _read_all(self, values: Sequence[Combination | int]) -> tuple[str, list[int]]:
        """The same for several."""
        found = [self._read(value) for value in values]
        return next((reason for reason, _ in found if reason), ""), [place for _, place in found]

    def _source(self, given: Chain, image: bool) -> tuple[str, int]:
        """Begin the chain with some terms or an earlier step's value, or take them up later."""
        steps = (
            [self.segment.steps[given.step]]
            if given.step is not None
            else [self.program.shared[t.value] for t in given.terms]
        )
        self.chain.numel += sum(step.numel for step in steps)
        if self._images is None:
            self.chain.terms, self.chain.step, self._images = given.terms, given.step, image
            return "", -1
        if image and not self._images:
            return "reads images where the first values are rows", -1
        return "", self._append(Layer(op="terms", terms=given.terms, step=given.step))

    def _fits(self, node: Node) -> bool:
        """Whether a value is images [N, C, H, W] or rows, and as many as the others."""
        shape = tuple(map(str, node.shape))
        rows = shape[:1] if len(shape) == 4 else shape[:-1]
        if len(shape) < 2 or len(shape) > 4:
            return False
        if self._shape is None:
            self._shape = rows
        return rows == self._shape


def _where(node: Node) -> str:
    return f"{node.op} ({node.source})"
