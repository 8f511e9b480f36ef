"""A segment's steps as the Triton backend looks at them: who reads what, the weights, and the layers before the loss.

The layers before the loss, where they are narrow, are one kernel with it (`Tail`);
backends/triton/schedule.py does the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modeconn.backends.activations import activation_of
from modeconn.backends.base import attempt
from modeconn.backends.node_reading import convolution_geometry, passes_through
from modeconn.backends.triton.values import Weight
from modeconn.capture.graph import In, Node
from modeconn.plan.program import Combination, Moving, Program, Segment, VaryingStep

# What a step reads: an earlier one, or shared values.
Operand = Combination | int


@dataclass
class Layer:
    """A linear layer in a tail."""

    weight: Weight
    bias: Weight | None
    activation: str = "identity"
    slope: float = 0.01


@dataclass
class Tail:
    """The layers before the loss that are one kernel with it: none where the logits are anything else's."""

    reads: Operand
    layers: list[Layer] = field(default_factory=list)


class Steps:
    """A segment's steps, and what is known of each: who reads it, and its weights.

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
        self.program, self.segment, self.precision, self.gradients = (
            program,
            segment,
            precision,
            gradients,
        )
        self.steps = segment.steps
        self.count = len(segment.point_indices)
        self.device = device
        self.kept: set[int] = set()  # shared values that calls read, and the planner's steps do not
        self._same = {
            i: step.inputs[0] for i, step in enumerate(self.steps) if self._passes_through(step)
        }
        self._weights: dict[int, Weight] = {}
        # by id of the form, which is kept alive
        self._columns: dict[int, tuple[Combination, Tensor]] = {}

    def weight(self, step: VaryingStep, leaf: Any) -> Weight | None:
        """The entry that an argument of a node is."""
        return None if leaf is None else self.entry(step.entries[leaf.index])

    def entry(self, entry: Tensor | Moving) -> Weight:
        """The weight that stands for an entry."""
        if id(entry) not in self._weights:
            self._weights[id(entry)] = Weight(
                entry, self.count, self.device, changes=self.gradients
            )
        return self._weights[id(entry)]

    def coefficients(self, form: Combination) -> Tensor:
        """The coefficients of a combination at all points, [T, J], taken to the device once."""
        if id(form) not in self._columns:
            columns = torch.stack([torch.from_numpy(term.coefficients) for term in form.terms], 1)
            self._columns[id(form)] = (form, columns.to(self.device, torch.float32))
        return self._columns[id(form)][1]

    def source(self, operand: Operand) -> Operand:
        """What an operand is, past operations that change nothing."""
        while isinstance(operand, int) and operand in self._same:
            operand = self._same[operand]
        return operand

    def inputs(self, index: int) -> tuple[Operand, ...]:
        """What a step reads."""
        step = self.steps[index]
        return (step.combine,) if step.combine is not None else tuple(map(self.source, step.inputs))

    def _passes_through(self, step: VaryingStep) -> bool:
        if step.combine is not None or len(step.inputs) != 1 or step.entries:
            return False
        return passes_through(step.node, self.program.graph.nodes[step.node.inputs[0]].shape)


def find_tail(steps: Steps, widest: int) -> Tail | None:
    """The layers before the loss, of no more than `widest` units if they are several; None where they are no such thing."""
    graph = steps.program.graph
    output = graph.tensor_output
    if (
        output is None
        or len(graph.nodes[output].shape) not in (2, 3)
        or not graph.nodes[output].batched
    ):
        return None
    form = steps.segment.outputs[output]
    if isinstance(form, Combination):
        return Tail(form)
    cursor = steps.source(form.step)
    tail = Tail(cursor)
    readers = readers_of(steps, [cursor] if isinstance(cursor, int) else [])
    activation, slope, before = "identity", 0.01, cursor
    while isinstance(before, int):
        step = steps.steps[before]
        if step.combine is None and is_linear(step):
            weight, bias = weight_and_bias(steps, step)
            narrow = max(weight.shape) <= widest and all(
                max(layer.weight.shape) <= widest for layer in tail.layers
            )
            if tail.layers and not (narrow and len(graph.nodes[output].shape) == 2):
                break
            tail.layers.insert(0, Layer(weight, bias, activation, slope))
            activation, slope = "identity", 0.01
            (before,) = steps.inputs(before)
            tail.reads = before
        elif (
            tail.layers
            and step.combine is None
            and activation == "identity"
            and (found := activation_of(step.node, "triton"))
        ):
            activation, slope = found.name, found.slope
            (before,) = steps.inputs(before)
        else:
            break
        if isinstance(before, int) and len(readers.get(before, ())) != 1:
            break
    return tail


def is_linear(step: VaryingStep) -> bool:
    """Whether a step is a linear layer that the kernels take."""
    return (
        step.node.op == "linear"
        and is_product(step)
        and step.node.batched
        and len(step.node.shape) >= 2
    )


def is_product(step: VaryingStep) -> bool:
    """Whether a step is a product with a weight of its own, and perhaps a bias."""
    args = step.node.args
    return (
        args[:1] == (In(0),)
        and len(step.inputs) == 1
        and len(step.entries) == 2 - (len(args) < 3 or args[2] is None)
    )


def convolution(node: Node) -> dict[str, Any] | None:
    """Stride and padding of a convolution that there is a kernel for."""
    if node.op != "conv2d":
        return None
    geometry = attempt(lambda: convolution_geometry(node))
    if isinstance(geometry, dict) and set(geometry) == {"stride", "padding"}:
        return geometry
    return None


def weight_and_bias(steps: Steps, step: VaryingStep) -> tuple[Weight, Weight | None]:
    """The entries of a product."""
    args = step.node.args
    weight = steps.weight(step, args[1])
    assert weight is not None
    return weight, steps.weight(step, args[2] if len(args) > 2 else None)


def affine(steps: Steps, step: VaryingStep) -> tuple[Tensor, Tensor]:
    """A batch norm with given statistics as scale and shift, [T, channels] over the segment's points."""
    node = step.node
    mean, var, weight, bias = (steps.weight(step, leaf) for leaf in node.args[1:5])
    assert mean is not None and var is not None
    scale = (var.exact() + node.args[5]).rsqrt()
    scale = scale if weight is None else scale * weight.exact()
    shift = -mean.exact() * scale if bias is None else bias.exact() - mean.exact() * scale
    return scale.float(), shift.float()


def readers_of(steps: Steps, wanted: Sequence[int]) -> dict[int, list[int]]:
    """Of every step that the wanted ones take, those that read it."""
    readers: dict[int, list[int]] = {index: [] for index in wanted}
    for index in reversed(range(len(steps.steps))):
        if index in readers:
            for operand in steps.inputs(index):
                if isinstance(operand, int):
                    readers.setdefault(operand, []).append(index)
    return readers
