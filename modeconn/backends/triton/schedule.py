"""Calls of the GPU kernels for a chunk of points at once; what goes together is fused.

A linear layer takes its activation along; a convolution its batch norm, a residual sum and its
activation; a combination is added up by the layer that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.activations import activation_of
from modeconn.backends.base import attempt
from modeconn.backends.node_reading import pooling_geometry
from modeconn.backends.triton.segment import (
    Operand,
    Steps,
    affine,
    convolution,
    is_linear,
    is_product,
    readers_of,
    weight_and_bias,
)
from modeconn.backends.triton.values import (
    AtPoints,
    Combined,
    Fixed,
    Value,
    Weight,
    materialized,
    run,
)
from modeconn.capture.graph import In, Node
from modeconn.kernels.blended import Blended
from modeconn.plan.program import Blend, Combination, Term

# A combination of more values than this is added up once, not by each tile of a kernel that reads
# it.
_MOST_TERMS = 4


@dataclass
class Scope:
    """What the calls of one chunk read and write.

    Attributes:
        points: which of the segment's.
        rows: how many.
        coefficients: a combination's coefficients on the device, [T, J].
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

    def read(self, operand: Operand) -> Value:
        """The value of what a step reads."""
        if isinstance(operand, int):
            return self.done[operand]
        if operand.constant:
            return Fixed(self.shared[operand.terms[0].value])
        terms = [self.shared[term.value] for term in operand.terms]
        if id(operand) not in self.stacked:
            self.stacked[id(operand)] = _stack(terms)
        return Combined(Blended(self.stacked[id(operand)], self.coefficients(operand)[self.points]))


@dataclass
class Call:
    """Something that gives the value of one step.

    Attributes:
        step: whose value it is: the last of those that it does.
        reads: what it reads.
        kernel: whether a GPU kernel does it.
        numel: size of its value, per row and point.
    """

    step: int
    reads: tuple[Operand, ...]
    do: Callable[[Scope], Value]
    kernel: bool = False
    numel: float = 0.0


class Schedule:
    """The calls that give the values of some steps.

    Attributes:
        calls: in order.
        drops: for each of them, the steps whose value nobody reads after it.
        numel: of all values alive at once, at most, per row and point.
        widest: of the largest value.
    """

    def __init__(self, steps: Steps, wanted: Sequence[Operand]) -> None:
        self._steps = steps
        self._wanted = [index for index in wanted if isinstance(index, int)]
        self._readers = readers_of(steps, self._wanted)
        self._taken: set[int] = set()
        # In order: a call takes later steps along, which then need none of their own.
        calls = [self._call(index) for index in sorted(self._readers) if index not in self._taken]
        self.calls = sorted(calls, key=lambda call: call.step)
        last = {i: n for n, call in enumerate(self.calls) for i in call.reads if isinstance(i, int)}
        self.drops = [
            [i for i, n in last.items() if n == at and i not in self._wanted]
            for at in range(len(self.calls))
        ]
        self.numel = self._most_alive()
        self.widest = max((call.numel for call in self.calls), default=0.0)

    def run(self, scope: Scope) -> None:
        """Do it all; the wanted values are then in `scope.done`."""
        for call, drops in zip(self.calls, self.drops):
            scope.done[call.step] = call.do(scope)
            for index in drops:
                del scope.done[index]

    def _most_alive(self) -> float:
        sizes = {call.step: call.numel for call in self.calls}
        alive: set[int] = set()
        most = 0.0
        for call, drops in zip(self.calls, self.drops):
            alive.add(call.step)
            most = max(most, sum(sizes[i] for i in alive))
            alive -= set(drops)
        return most

    # -- one call ----------------------------------------------------------------------------------

    def _call(self, index: int) -> Call:
        steps, step = self._steps, self._steps.steps[index]
        node = step.node
        if step.combine is not None:
            form = step.combine
            first = None if steps.gradients else self._first_convolution(index)
            return first or Call(index, (form,), lambda scope: scope.read(form), numel=step.numel)
        if is_linear(step):
            return self._linear(index)
        if steps.gradients:  # the other kernels have no backward
            return self._plain(index)
        if is_product(step) and convolution(node) is not None:
            weight, bias = weight_and_bias(steps, step)
            return self._convolution(index, node, weight, bias, steps.inputs(index)[0])
        if (
            node.op in ("max_pool2d", "avg_pool2d")
            and len(node.shape) == 4
            and isinstance(attempt(lambda: pooling_geometry(node)), dict)
        ):
            return self._pool(index)
        if node.op == "batch_norm" and len(step.inputs) == 1:
            return self._scaled(index)
        if node.op in ("layer_norm", "rms_norm") and node.batched and len(node.args[1]) == 1:
            return self._row_norm(index)
        return self._plain(index)

    def _plain(self, index: int) -> Call:
        """By PyTorch; but an activation of a combination is left to the kernel that reads it."""
        steps, step = self._steps, self._steps.steps[index]
        reads = steps.inputs(index)
        shapes = [steps.program.graph.nodes[i].shape for i in step.node.inputs]
        weights = [steps.entry(entry) for entry in step.entries]
        activation = activation_of(step.node, "triton")

        def do(scope: Scope) -> Value:
            values = [scope.read(operand) for operand in reads]
            first = values[0] if len(values) == 1 else None
            if (
                activation is not None
                and isinstance(first, Combined)
                and first.activation == "identity"
            ):
                return Combined(first.blended, activation.name, activation.slope)
            return run(
                step.node,
                shapes,
                list(map(materialized, values)),
                weights,
                scope.points,
                scope.rows,
            )

        return Call(index, reads, do, numel=step.numel)

    def _linear(self, index: int) -> Call:
        from modeconn.kernels.path_linear import path_linear

        steps, step = self._steps, self._steps.steps[index]
        weight, bias = weight_and_bias(steps, step)
        (read,) = steps.inputs(index)
        last, activation, slope = self._then_activation(index)

        def do(scope: Scope) -> Value:
            x, options = as_read(scope.read(read))
            x, before = as_matrix(x, len(step.node.shape))
            out = path_linear(
                x,
                weight.blended(scope.points),
                bias and bias.blended(scope.points),
                activation=activation,
                slope=slope,
                precision=steps.precision,
                **options,
            )
            return AtPoints(out.unflatten(1, before))

        return Call(last, (read,), do, kernel=True, numel=step.numel)

    def _convolution(
        self, index: int, node: Node, weight: Weight, bias: Weight | None, read: Operand
    ) -> Call:
        from modeconn.kernels.path_conv2d import path_conv2d

        steps = self._steps
        geometry = convolution(node) or {}
        last, norm, other = index, None, None
        following = self._only_reader(last)
        if following is not None and self._is_norm(following):
            norm = affine(steps, steps.steps[following])
            last = self._take(following)
            following = self._only_reader(last)
        if following is not None:
            other = self._residual(following, last)
            last = last if other is None else self._take(following)
        last, activation, slope = self._then_activation(last)

        def do(scope: Scope) -> Value:
            x, options = as_read(scope.read(read))
            if norm is not None:
                options |= {"scale": norm[0][scope.points], "shift": norm[1][scope.points]}
            if other is not None:
                options["residual"] = at_points(scope.read(other), scope.points)
            return AtPoints(
                path_conv2d(
                    x,
                    weight.blended(scope.points),
                    bias and bias.blended(scope.points),
                    activation=activation,
                    slope=slope,
                    precision=steps.precision,
                    **geometry,
                    **options,
                )
            )

        reads = (read,) if other is None else (read, other)
        return Call(last, reads, do, kernel=True, numel=steps.steps[index].numel)

    def _first_convolution(self, index: int) -> Call | None:
        """A combination of convolutions of one input that a norm follows: the kernel folds norms into convolutions only."""
        steps, step = self._steps, self._steps.steps[index]
        following = self._only_reader(index)
        if following is None or not self._is_norm(following):
            return None
        terms = step.combine.terms  # type: ignore[union-attr]
        shared = [steps.program.shared[term.value] for term in terms]
        node, columns = shared[0].node, tuple(term.coefficients for term in terms)
        same = (
            len({(each.node.id, each.inputs) for each in shared}) == 1
            and len(shared[0].inputs) == 1
        )
        if not same or convolution(node) is None:
            return None
        sets = zip(*(each.entries for each in shared))
        entries = [Weight(Blend(tensors, columns), steps.count, steps.device) for tensors in sets]
        (value,) = shared[0].inputs
        steps.kept.add(value)
        read = Combination((Term(value, np.ones(steps.count)),))
        return self._convolution(
            index, node, entries[0], entries[1] if len(entries) > 1 else None, read
        )

    def _pool(self, index: int) -> Call:
        from modeconn.kernels.path_pool2d import path_pool2d

        steps, step = self._steps, self._steps.steps[index]
        geometry = pooling_geometry(step.node)
        reads = steps.inputs(index)
        kind = step.node.op.removesuffix("_pool2d")

        def do(scope: Scope) -> Value:
            return AtPoints(
                path_pool2d(at_points(scope.read(reads[0]), scope.points), kind, **geometry)
            )

        return Call(index, reads, do, kernel=True, numel=step.numel)

    def _row_norm(self, index: int) -> Call:
        from modeconn.kernels.path_norm import path_layer_norm, path_rms_norm

        steps, step = self._steps, self._steps.steps[index]
        node, reads = step.node, steps.inputs(index)
        weight = steps.weight(step, node["weight"])
        bias = steps.weight(step, node["bias"]) if node.op == "layer_norm" else None
        eps = node["eps"]
        if weight is None or eps is None:
            return self._plain(index)

        def do(scope: Scope) -> Value:
            x, w = at_points(scope.read(reads[0]), scope.points), weight.blended(scope.points)
            if node.op == "rms_norm":
                return AtPoints(path_rms_norm(x, w, eps))
            return AtPoints(path_layer_norm(x, w, bias and bias.blended(scope.points), eps))

        return Call(index, reads, do, kernel=True, numel=step.numel)

    def _scaled(self, index: int) -> Call:
        """A batch norm that no convolution has taken along: a scale and a shift for each channel."""
        steps, step = self._steps, self._steps.steps[index]
        scale, shift = affine(steps, step)
        reads = steps.inputs(index)
        rank = len(step.node.shape)

        def do(scope: Scope) -> Value:
            value = materialized(scope.read(reads[0])).value
            here = [
                v[scope.points].view(-1, 1, v.shape[1], *[1] * (rank - 2)) for v in (shift, scale)
            ]
            return AtPoints(torch.addcmul(here[0], value, here[1]))

        return Call(index, reads, do, numel=step.numel)

    # -- what follows ------------------------------------------------------------------------------

    def _only_reader(self, index: int) -> int | None:
        """The one step that reads a value and may be fused with it."""
        if index in self._wanted or len(self._readers[index]) != 1:
            return None
        (reader,) = self._readers[index]
        return (
            None
            if reader in self._taken or self._steps.steps[reader].combine is not None
            else reader
        )

    def _take(self, index: int) -> int:
        self._taken.add(index)
        return index

    def _then_activation(self, index: int) -> tuple[int, str, float]:
        following = self._only_reader(index)
        found = (
            activation_of(self._steps.steps[following].node, "triton")
            if following is not None
            else None
        )
        if following is None or found is None:
            return index, "identity", 0.01
        return self._take(following), found.name, found.slope

    def _is_norm(self, index: int) -> bool:
        step = self._steps.steps[index]
        return step.node.op == "batch_norm" and len(step.inputs) == 1

    def _residual(self, index: int, own: int) -> Operand | None:
        """What a sum adds to one of its two inputs."""
        step = self._steps.steps[index]
        node, inputs = step.node, self._steps.inputs(index)
        if (
            node.op != "add"
            or node.kwargs
            or node.args != (In(0), In(1))
            or len(set(map(id, inputs))) < 2
        ):
            return None
        shapes = {tuple(map(str, self._steps.program.graph.nodes[i].shape)) for i in node.inputs}
        others = [operand for operand in inputs if operand != own]
        return others[0] if len(shapes) == 1 and len(others) == 1 else None


def as_read(value: Value) -> tuple[Tensor | Blended, dict[str, Any]]:
    """A value as the products take it, and how they are to treat it."""
    if isinstance(value, Combined):
        if len(value.blended.tensors) <= _MOST_TERMS and value.activation != "leaky_relu":
            return value.blended, {"input_activation": value.activation}
        value = value.materialized()
    return value.value, {}


def as_matrix(x: Tensor | Blended, rank: int) -> tuple[Tensor | Blended, list[int]]:
    """A value of so many axes as rows × features, and how many rows there are along each of the axes before the last."""
    tensor = x.tensors if isinstance(x, Blended) else x
    flat = tensor.flatten(-rank, -2)
    return Blended(flat, x.coefficients) if isinstance(x, Blended) else flat, list(
        tensor.shape[-rank:-1]
    )


def at_points(value: Value, points: slice) -> Tensor:
    """A value with the points in front."""
    value = materialized(value)
    tensor: Tensor = value.value
    return (
        tensor
        if isinstance(value, AtPoints)
        else tensor.expand(points.stop - points.start, *tensor.shape)
    )


def _stack(terms: Sequence[Tensor]) -> Tensor:
    """[J, …]; images keep the channels of a pixel together."""
    if terms[0].dim() == 4:
        return torch.stack([term.permute(0, 2, 3, 1) for term in terms]).permute(0, 1, 4, 2, 3)
    return torch.stack(list(terms))
