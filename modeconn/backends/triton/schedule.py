"""The operations that compute a segment's steps for a chunk of points at once.

Steps that follow each other are fused: a linear layer takes its activation along; a convolution its
batch norm, a residual sum and its activation; the layer that reads a combination sums its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.activations import IDENTITY, Activation, activation_of
from modeconn.backends.node_reading import LARGEST_FOLDED, of_dtype, pooling_geometry
from modeconn.backends.triton.segment import (
    Operand,
    SegmentSteps,
    affine,
    convolution,
    is_linear,
    is_product,
    weight_and_bias,
)
from modeconn.backends.triton.values import (
    AtPoints,
    Combined,
    Fixed,
    Value,
    Weight,
    as_matrix,
    as_read,
    at_points,
    materialized,
    run,
)
from modeconn.capture.graph import In, Node
from modeconn.capture.optimisations import current
from modeconn.errors import Unsupported
from modeconn.kernels.blended import Blended
from modeconn.plan.program import Blend, Combination, Term, VaryingStep


@dataclass
class Chunk:
    """A chunk of points and rows, with the values that operations read and write.

    Attributes:
        points: which of the segment's.
        rows: how many.
        coefficients: returns a combination's coefficients on the device, [T, J].
        shared: the shared values, cut down to these rows.
        stacked: shared values of combinations, stacked when they are first used.
        done: values of the steps so far.
    """

    points: slice
    rows: int
    coefficients: Callable[[Combination], Tensor]
    shared: dict[int, Any]
    stacked: dict[int, Tensor] = field(default_factory=dict)
    done: dict[int, Value] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of points."""
        count: int = self.points.stop - self.points.start
        return count

    def read(self, operand: Operand) -> Value:
        """Returns the value of an operand."""
        if isinstance(operand, int):
            return self.done[operand]
        if operand.constant:
            return Fixed(self.shared[operand.terms[0].value])
        if id(operand) not in self.stacked:
            terms = [self.shared[term.value] for term in operand.terms]
            self.stacked[id(operand)] = _stack(terms)
        return Combined(Blended(self.stacked[id(operand)], self.coefficients(operand)[self.points]))


def _stack(terms: Sequence[Tensor]) -> Tensor:
    """Stacks terms as [J, …]; images keep the channels of a pixel together."""
    if terms[0].dim() == 4:
        return torch.stack([term.permute(0, 2, 3, 1) for term in terms]).permute(0, 1, 4, 2, 3)
    return torch.stack(list(terms))


@dataclass
class Operation:
    """An operation on a chunk, which computes one step's value.

    Attributes:
        step: whose value it computes: the last of those that are fused in it.
        reads: its operands.
        compute: returns the value.
        kernel: whether a GPU kernel computes it.
        numel: size of its value, per row and point.
    """

    step: int
    reads: tuple[Operand, ...]
    compute: Callable[[Chunk], Value]
    kernel: bool = False
    numel: float = 0.0


class ChunkSchedule:
    """The operations that compute the requested steps, in order.

    Attributes:
        operations: in order.
        drops: for each of them, the steps whose value no later one reads.
        numel: of all values alive at once, at most, per row and point.
        widest: of the largest value.
    """

    def __init__(self, steps: SegmentSteps, requested: Sequence[Operand]) -> None:
        self._steps = steps
        self._requested = [index for index in requested if isinstance(index, int)]
        self._readers = steps.readers(self._requested)
        self._fused: set[int] = set()
        operations: dict[int, Operation] = {}
        # In order: an operation takes later steps along, which then need none of their own.
        for index in sorted(self._readers):
            if index not in self._fused:
                operations[index] = self._operation(index)
        self.operations = sorted(operations.values(), key=lambda operation: operation.step)
        self.drops = self._last_reads()
        self.numel = self._most_alive()
        self.widest = max((operation.numel for operation in self.operations), default=0.0)

    def run(self, chunk: Chunk) -> None:
        """Computes the requested values, which are then in `chunk.done`."""
        for operation, drops in zip(self.operations, self.drops):
            chunk.done[operation.step] = operation.compute(chunk)
            for index in drops:
                del chunk.done[index]

    def _last_reads(self) -> list[list[int]]:
        last: dict[int, int] = {}
        for place, operation in enumerate(self.operations):
            last |= {operand: place for operand in operation.reads if isinstance(operand, int)}
        drops: list[list[int]] = [[] for _ in self.operations]
        for index, place in last.items():
            if index not in self._requested:
                drops[place].append(index)
        return drops

    def _most_alive(self) -> float:
        sizes = {operation.step: operation.numel for operation in self.operations}
        alive: set[int] = set()
        most = 0.0
        for operation, drops in zip(self.operations, self.drops):
            alive.add(operation.step)
            most = max(most, sum(sizes[index] for index in alive))
            alive -= set(drops)
        return most

    # -- one operation -----------------------------------------------------------------------------

    def _operation(self, index: int) -> Operation:
        steps, step = self._steps, self._steps.steps[index]
        node = step.node
        if step.combine is not None:
            return self._combination(index, step.combine)
        if not self._of_dtype(step):
            return self._plain(index)
        if is_linear(step):
            return self._linear(index)
        if steps.gradients:  # the other kernels have no backward
            return self._plain(index)
        if node.op == "conv2d" and is_product(step) and convolution(node) is not None:
            return self._convolution(
                index, node, weight_and_bias(steps, step), steps.inputs(index)[0]
            )
        images = len(node.shape) == 4
        geometry = pooling(node) if images else None
        if geometry is not None:
            return self._pool(index, geometry)
        if self._is_norm(index):
            return self._scaled(index)
        of_rows = node.op in ("layer_norm", "rms_norm") and node.batched
        if of_rows and len(node["normalized_shape"]) == 1:
            return self._row_norm(index)
        return self._plain(index)

    def _combination(self, index: int, form: Combination) -> Operation:
        first = None if self._steps.gradients else self._first_convolution(index, form)
        if first is not None:
            return first
        numel = self._steps.steps[index].numel
        return Operation(index, (form,), lambda chunk: chunk.read(form), numel=numel)

    def _plain(self, index: int) -> Operation:
        """Runs a step in PyTorch; an activation of a combination is left to the reading kernel."""
        steps, step = self._steps, self._steps.steps[index]
        reads = steps.inputs(index)
        shapes = [steps.program.graph.nodes[i].shape for i in step.node.inputs]
        weights = [steps.entry(entry) for entry in step.entries]
        activation = activation_of(step.node, "triton")

        def compute(chunk: Chunk) -> Value:
            values = [chunk.read(operand) for operand in reads]
            if activation is not None and len(values) == 1:
                (value,) = values
                if isinstance(value, Combined) and value.activation is IDENTITY:
                    return Combined(value.blended, activation)
            inputs = list(map(materialized, values))
            return run(step.node, shapes, inputs, weights, chunk.points, chunk.rows)

        return Operation(index, reads, compute, numel=step.numel)

    def _linear(self, index: int) -> Operation:
        from modeconn.kernels.path_linear import path_linear

        steps, step = self._steps, self._steps.steps[index]
        weight, bias = weight_and_bias(steps, step)
        (read,) = steps.inputs(index)
        last, activation = self._then_activation(index)

        def compute(chunk: Chunk) -> Value:
            x, options = as_read(chunk.read(read))
            x, before = as_matrix(x, len(step.node.shape))
            out = path_linear(
                x,
                weight.blended(chunk.points),
                bias and bias.blended(chunk.points),
                activation=activation.name,
                slope=activation.slope,
                precision=steps.precision,
                **options,
            )
            return AtPoints(out.unflatten(1, before))

        return Operation(last, (read,), compute, kernel=True, numel=step.numel)

    def _convolution(
        self, index: int, node: Node, weights: tuple[Weight, Weight | None], read: Operand
    ) -> Operation:
        from modeconn.kernels.path_conv2d import path_conv2d

        steps = self._steps
        weight, bias = weights
        last, norm, other = index, None, None
        following = self._only_reader(last)
        if following is not None and self._folds(following):
            norm = affine(steps, steps.steps[following])
            last = self._fuse(following)
            following = self._only_reader(last)
        if following is not None:
            other = self._residual(following, last)
            last = last if other is None else self._fuse(following)
        last, activation = self._then_activation(last)
        constant: dict[str, Any] = {"activation": activation.name, "slope": activation.slope}
        constant |= {"precision": steps.precision} | (convolution(node) or {})

        def compute(chunk: Chunk) -> Value:
            x, options = as_read(chunk.read(read))
            if norm is not None:
                options |= {"scale": norm[0][chunk.points], "shift": norm[1][chunk.points]}
            if other is not None:
                options["residual"] = at_points(chunk.read(other), chunk.count)
            at = weight.blended(chunk.points), bias and bias.blended(chunk.points)
            return AtPoints(path_conv2d(x, *at, **constant, **options))

        reads = (read,) if other is None else (read, other)
        return Operation(last, reads, compute, kernel=True, numel=steps.steps[index].numel)

    def _first_convolution(self, index: int, form: Combination) -> Operation | None:
        """Returns a combination of convolutions of one input as one of them, if a norm follows.

        The planner has combined their values; but the kernel folds norms into convolutions only.
        """
        steps = self._steps
        following = self._only_reader(index)
        if following is None or not self._folds(following):
            return None
        shared = [steps.program.shared[term.value] for term in form.terms]
        node, inputs = shared[0].node, shared[0].inputs
        same = all(each.node.id == node.id and each.inputs == inputs for each in shared)
        if not same or len(inputs) != 1 or convolution(node) is None:
            return None
        columns = tuple(term.coefficients for term in form.terms)
        sets = zip(*[each.entries for each in shared])
        weight, *bias = (Weight(Blend(each, columns), steps.count, steps.device) for each in sets)
        steps.kept.add(inputs[0])
        read = Combination((Term(inputs[0], np.ones(steps.count)),))
        return self._convolution(index, node, (weight, bias[0] if bias else None), read)

    def _pool(self, index: int, geometry: dict[str, Any]) -> Operation:
        from modeconn.kernels.path_pool2d import path_pool2d

        step = self._steps.steps[index]
        (read,) = reads = self._steps.inputs(index)
        kind = step.node.op.removesuffix("_pool2d")

        def compute(chunk: Chunk) -> Value:
            return AtPoints(path_pool2d(at_points(chunk.read(read), chunk.count), kind, **geometry))

        return Operation(index, reads, compute, kernel=True, numel=step.numel)

    def _row_norm(self, index: int) -> Operation:
        from modeconn.kernels.path_norm import path_layer_norm, path_rms_norm

        steps, step = self._steps, self._steps.steps[index]
        node, reads = step.node, steps.inputs(index)
        weight, eps = steps.weight(step, node["weight"]), node["eps"]
        bias = steps.weight(step, node["bias"]) if node.op == "layer_norm" else None
        if weight is None or eps is None:
            return self._plain(index)

        def compute(chunk: Chunk) -> Value:
            x = at_points(chunk.read(reads[0]), chunk.count)
            w = weight.blended(chunk.points)
            if node.op == "rms_norm":
                return AtPoints(path_rms_norm(x, w, eps))
            return AtPoints(path_layer_norm(x, w, bias and bias.blended(chunk.points), eps))

        return Operation(index, reads, compute, kernel=True, numel=step.numel)

    def _scaled(self, index: int) -> Operation:
        """A batch norm that is fused in no convolution: a scale and a shift for each channel."""
        step = self._steps.steps[index]
        vectors = affine(self._steps, step)
        reads = self._steps.inputs(index)
        ones = [1] * (len(step.node.shape) - 2)

        def compute(chunk: Chunk) -> Value:
            x = materialized(chunk.read(reads[0])).value
            scale, shift = (v[chunk.points].view(-1, 1, v.shape[1], *ones) for v in vectors)
            return AtPoints(torch.addcmul(shift, x, scale))

        return Operation(index, reads, compute, numel=step.numel)

    # -- what follows ------------------------------------------------------------------------------

    def _only_reader(self, index: int) -> int | None:
        """Returns the one step that reads a value and may be fused with it."""
        if index in self._requested or len(self._readers[index]) != 1:
            return None
        (reader,) = self._readers[index]
        free = reader not in self._fused and self._steps.steps[reader].combine is None
        return reader if free else None

    def _fuse(self, index: int) -> int:
        self._fused.add(index)
        return index

    def _then_activation(self, index: int) -> tuple[int, Activation]:
        """Fuses an activation that follows, if one does; returns the last step and activation."""
        following = self._only_reader(index)
        if following is None:
            return index, IDENTITY
        found = activation_of(self._steps.steps[following].node, "triton")
        return (index, IDENTITY) if found is None else (self._fuse(following), found)

    def _is_norm(self, index: int) -> bool:
        step = self._steps.steps[index]
        return step.node.op == "batch_norm" and len(step.inputs) == 1 and self._of_dtype(step)

    def _folds(self, index: int) -> bool:
        """Whether a step is a norm that a convolution takes along."""
        if not (current().folding and self._is_norm(index)):
            return False
        scale, _ = affine(self._steps, self._steps.steps[index])
        return not bool((scale.abs() > LARGEST_FOLDED).any())

    def _of_dtype(self, step: VaryingStep) -> bool:
        """Whether the kernels, which compute in the program's dtype, may run a step."""
        return all(of_dtype(entry, self._steps.program.dtype) for entry in step.entries)

    def _residual(self, index: int, own: int) -> Operand | None:
        """Returns the operand that a sum adds to another one, `own`."""
        node, inputs = self._steps.steps[index].node, self._steps.inputs(index)
        if node.op != "add" or len(set(map(id, inputs))) < 2:
            return None
        if (node["self"], node["other"], node["alpha"]) != (In(0), In(1), 1):
            return None
        shapes = {tuple(map(str, self._steps.program.graph.nodes[i].shape)) for i in node.inputs}
        others = [operand for operand in inputs if operand != own]
        return others[0] if len(shapes) == 1 and len(others) == 1 else None


def pooling(node: Node) -> dict[str, Any] | None:
    """Returns kernel, stride and padding of a pooling that there is a kernel for."""
    if node.op not in ("max_pool2d", "avg_pool2d"):
        return None
    try:
        return pooling_geometry(node)
    except Unsupported:
        return None
