"""A segment's steps as the Triton backend reads them: their readers and weights, and the epilogue.

The layers before the loss, where they are narrow, are one kernel with it (`Epilogue`);
backends/triton/schedule.py does the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modeconn.backends.activations import IDENTITY, Activation, activation_of
from modeconn.backends.node_reading import convolution_geometry, passes_through
from modeconn.backends.triton.values import Weight
from modeconn.capture.graph import In, Node
from modeconn.errors import Unsupported
from modeconn.plan.program import Combination, Moving, Program, Segment, VaryingStep

# What a step reads: an earlier one, or shared values.
Operand = Combination | int


@dataclass(frozen=True)
class EpilogueLayer:
    """A linear layer that is one kernel with the loss."""

    weight: Weight
    bias: Weight | None
    activation: Activation


@dataclass(frozen=True)
class Epilogue:
    """The layers that are one kernel with the loss: none where it takes the logits as they are.

    Attributes:
        reads: the first layer's input, or the logits.
    """

    reads: Operand
    layers: tuple[EpilogueLayer, ...] = ()


class SegmentSteps:
    """A segment's steps, with the weights that they read and the inputs that they really have.

    Args:
        gradients: whether outputs are differentiated, and weights may change.
    """

    def __init__(
        self,
        program: Program,
        segment: Segment,
        device: torch.device,
        precision: str,
        gradients: bool = False,
    ) -> None:
        self.program = program
        self.segment = segment
        self.device = device
        self.precision = precision
        self.gradients = gradients
        self.steps = segment.steps
        self.count = len(segment.point_indices)
        self.kept: set[int] = set()  # shared values that calls read, and the planner's steps do not
        self._same = {
            index: step.inputs[0]
            for index, step in enumerate(self.steps)
            if self._passes_through(step)
        }
        self._weights: dict[int, Weight] = {}
        # by id of the combination, which is kept alive
        self._coefficients: dict[int, tuple[Combination, Tensor]] = {}

    def weight(self, step: VaryingStep, leaf: Any) -> Weight | None:
        """Returns the weight that stands for an argument of a step's node, if there is one."""
        return None if leaf is None else self.entry(step.entries[leaf.index])

    def entry(self, entry: Tensor | Moving) -> Weight:
        """Returns the weight that stands for a parameter or buffer; one for each."""
        if id(entry) not in self._weights:
            weight = Weight(entry, self.count, self.device, changes=self.gradients)
            self._weights[id(entry)] = weight
        return self._weights[id(entry)]

    def coefficients(self, form: Combination) -> Tensor:
        """Returns a combination's coefficients at all points, [T, J], taken to the device once."""
        if id(form) not in self._coefficients:
            columns = torch.stack([torch.from_numpy(term.coefficients) for term in form.terms], 1)
            self._coefficients[id(form)] = (form, columns.to(self.device, torch.float32))
        return self._coefficients[id(form)][1]

    def source(self, operand: Operand) -> Operand:
        """Follows an operand back past operations that change nothing."""
        while isinstance(operand, int) and operand in self._same:
            operand = self._same[operand]
        return operand

    def inputs(self, index: int) -> tuple[Operand, ...]:
        """Returns the operands of a step."""
        step = self.steps[index]
        return (step.combine,) if step.combine is not None else tuple(map(self.source, step.inputs))

    def readers(self, requested: Sequence[int]) -> dict[int, list[int]]:
        """Lists the readers of every step that the requested ones need, themselves included."""
        readers: dict[int, list[int]] = {index: [] for index in requested}
        for index in reversed(range(len(self.steps))):
            if index not in readers:
                continue
            for operand in self.inputs(index):
                if isinstance(operand, int):
                    readers.setdefault(operand, []).append(index)
        return readers

    def _passes_through(self, step: VaryingStep) -> bool:
        if step.combine is not None or len(step.inputs) != 1 or step.entries:
            return False
        return passes_through(step.node, self.program.graph.nodes[step.node.inputs[0]].shape)


def find_epilogue(steps: SegmentSteps, widest: int) -> Epilogue | None:
    """Finds the layers before the loss, of no more than `widest` units if they are several.

    Returns:
        None where the output is no tensor of class logits.
    """
    graph = steps.program.graph
    if graph.tensor_output is None:
        return None
    output = graph.nodes[graph.tensor_output]
    if len(output.shape) not in (2, 3) or not output.batched:
        return None
    form = steps.segment.outputs[output.id]
    if isinstance(form, Combination):
        return Epilogue(form)
    cursor = steps.source(form.step)
    epilogue = Epilogue(cursor)
    readers = steps.readers([cursor] if isinstance(cursor, int) else [])
    activation = IDENTITY
    while isinstance(cursor, int) and steps.steps[cursor].combine is None:
        step = steps.steps[cursor]
        found = activation_of(step.node, "triton")
        if is_linear(step):
            first = EpilogueLayer(*weight_and_bias(steps, step), activation)
            layers = (first, *epilogue.layers)
            chained = len(output.shape) == 2 and all(
                max(layer.weight.shape) <= widest for layer in layers
            )
            if len(layers) > 1 and not chained:
                break
            (cursor,) = steps.inputs(cursor)
            epilogue = Epilogue(cursor, layers)
            activation = IDENTITY
        elif found is not None and epilogue.layers and activation is IDENTITY:
            activation = found
            (cursor,) = steps.inputs(cursor)
        else:
            break
        if isinstance(cursor, int) and len(readers.get(cursor, ())) != 1:
            break
    return epilogue


def is_linear(step: VaryingStep) -> bool:
    """Whether a step is a linear layer that the kernels take."""
    node = step.node
    return node.op == "linear" and is_product(step) and node.batched and len(node.shape) >= 2


def is_product(step: VaryingStep) -> bool:
    """Whether a step is a product with a weight of its own, and perhaps a bias."""
    node = step.node
    entries = 1 if node["bias"] is None else 2
    return node["input"] == In(0) and len(step.inputs) == 1 and len(step.entries) == entries


def convolution(node: Node) -> dict[str, Any] | None:
    """Returns stride and padding of a convolution that there is a kernel for."""
    if node.op != "conv2d":
        return None
    try:
        geometry = convolution_geometry(node)
    except Unsupported:
        return None
    return geometry if set(geometry) == {"stride", "padding"} else None


def weight_and_bias(steps: SegmentSteps, step: VaryingStep) -> tuple[Weight, Weight | None]:
    """Returns the weight and the bias of a product."""
    weight = steps.weight(step, step.node["weight"])
    assert weight is not None
    return weight, steps.weight(step, step.node["bias"])


def affine(steps: SegmentSteps, step: VaryingStep) -> tuple[Tensor, Tensor]:
    """Returns a batch norm with given statistics as scale and shift, [T, channels]."""
    node = step.node
    names = ("mean", "var", "weight", "bias")
    mean, var, weight, bias = (steps.weight(step, node[name]) for name in names)
    assert mean is not None and var is not None
    scale = (var.exact() + node["eps"]).rsqrt()
    if weight is not None:
        scale = scale * weight.exact()
    shift = -mean.exact() * scale
    if bias is not None:
        shift = bias.exact() + shift
    return scale.float(), shift.float()
