"""Reference backend: plain PyTorch, every dtype and device. The others are tested against it.

Shared values are computed once per batch. Then, for each point, the weights are materialized once
and blocks of rows, small enough for their activations to stay in the cache, go through all steps
down to the sums of the head.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from modeconn.backends.base import Request, Tick, Values
from modeconn.backends.blocking import block_rows
from modeconn.data.inputs import Inputs
from modeconn.metrics import Head
from modeconn.parameters.blending import blend
from modeconn.plan.program import (
    Combination,
    Moving,
    Program,
    Segment,
    Varying,
    shared_steps,
)


class FusedSteps(Protocol):
    """Steps `first` to a last one, run as one; nothing outside reads any value but the last."""

    @property
    def first(self) -> int:
        """The first of the steps."""

    def run(self, point: int, constant: Callable[[int], Tensor], done: dict[int, Tensor]) -> Tensor:
        """The last step's value, from shared values, by number, and earlier steps' values."""


# By the segment's index, then by the last of the steps; shared steps are a segment, too.
Fused = Mapping[int, Mapping[int, FusedSteps]]


class ReferenceBackend:
    """Runs a program on batches of rows, point by point, with PyTorch's operations.

    A backend with kernels for some of a program derives from it and leaves the rest to it.

    Args:
        program: what to run.
        dtype, device: of the computation.
        kept: shared values to keep for a batch besides those that the program's segments read.
        fused: steps that run as one, where another backend has a way to.
        block: rows that go through the steps together; by default what fits the cache.
    """

    name = "reference"

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kept: Iterable[int] = (),
        fused: Fused | None = None,
        block: int | None = None,
    ) -> None:
        self.program = program
        self.kept = frozenset(program.kept()).union(kept)
        self._shared = shared_steps(program, self.kept)
        self._fused, self._device = fused or {}, device
        self._block = block_rows(program, dtype, device) if block is None else block
        self._item = torch.finfo(dtype).bits // 8
        self._orders: dict[int, _Order] = {}

    @classmethod
    def supports(cls, request: Request) -> None:
        """Accepts every request."""

    @classmethod
    def create(cls, request: Request) -> ReferenceBackend:
        """Makes the backend; the precision is set around its calls (backends/precision.py)."""
        return cls(request.program, request.dtype, request.device)

    def most_rows(self, budget: int) -> int:
        """Rows to take at a time, so that the shared values kept for them fit a budget of bytes.

        Blocks of rows are cut out of shared values along their first axis. Where some value has
        another first axis (tokens folded into the batch, say), or is the object that a network
        returns which runs as it is, a batch must be one block.
        """
        steps = [self.program.shared[number] for number in self.kept]
        batched = [step for step in steps if step.node.batched]
        bytes_per_row = sum(step.numel for step in batched) * self._item
        rows = max(self._block, int(budget // max(bytes_per_row, 1.0)))
        graph = self.program.graph
        if graph.tensor_output is not None and not isinstance(graph.example, Tensor):
            return min(rows, self._block)
        sliceable = all(str(step.node.shape[0]) == "N" for step in batched if step.node.shape)
        return rows if sliceable else min(rows, self._block)

    def shared(self, x: Inputs) -> Values:
        """The shared values of a batch that the segments read."""
        inputs = [_channels_last(tensor) for tensor in self.program.graph.given(x)]
        given, rows = dict(enumerate(inputs)), len(inputs[0])
        steps, order = self._shared, self._order_of(self._shared)
        run = _AtPoint(self.program, steps, 0, order, given, rows, self._device)
        parts: dict[int, list[Any]] = {}
        for block in self._blocks(rows):
            for number, value in run.values(block).items():
                parts.setdefault(number, []).append(value)
        return {number: self._joined(number, part) for number, part in parts.items()}

    def _joined(self, number: int, parts: list[Any]) -> Any:
        """A shared value from those of the blocks, which are equal where they have no rows."""
        batched = self.program.shared[number].node.batched
        return torch.cat(parts) if len(parts) > 1 and batched else parts[0]

    def sums(
        self, segment: Segment, values: Values, targets: Tensor, head: Head, tick: Tick
    ) -> Tensor:
        """The head's sums over a batch at each of the segment's points, float64 [T, metrics].

        Args:
            values: what `shared` returned for the batch.
            targets: as `head.fit` returned them.
            tick: called after each point.
        """
        whole = self.program.graph.tensor_output
        form = segment.outputs[whole] if whole is not None else None
        if isinstance(form, Combination):
            return _sums_of_combination(form, values, targets, head, tick)
        sums = head.zeros(len(segment.point_indices), targets.device)
        for point in range(len(segment.point_indices)):
            for rows, outputs in self.outputs(segment, point, values, len(targets)):
                sums[point] += head.sums(outputs, targets[rows])
            tick()
        return sums

    def all_outputs(
        self, segment: Segment, values: Values, rows: int
    ) -> Iterator[tuple[int, slice, Any]]:
        """The network's output: (point, block of rows, output); blocks of a point come in order."""
        for point in range(len(segment.point_indices)):
            for block, output in self.outputs(segment, point, values, rows):
                yield point, block, output

    def outputs(
        self, segment: Segment, point: int, values: Values, rows: int
    ) -> Iterator[tuple[slice, Any]]:
        """The network's output at one point, a block of rows at a time."""
        order = self._order_of(segment)
        at_point = _AtPoint(self.program, segment, point, order, values, rows, self._device)
        for block in self._blocks(rows):
            yield block, at_point.output(block)

    def _order_of(self, segment: Segment) -> _Order:
        if segment.index not in self._orders:
            fused = self._fused.get(segment.index, {})
            self._orders[segment.index] = _Order(segment, fused)
        return self._orders[segment.index]

    def _blocks(self, rows: int) -> Iterator[slice]:
        step = rows if self.program.graph.mixes_rows else self._block
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))


class _Order:
    """Holds what of a segment is done at each of its points, found once.

    Attributes:
        fused: steps that run as one, by the last of them.
        alone: the steps that are run one by one.
        done: (step, values that nothing reads after it), in order.
    """

    def __init__(self, segment: Segment, fused: Mapping[int, FusedSteps]) -> None:
        self.fused = fused
        inside: set[int] = set()
        for last, steps in fused.items():
            inside.update(range(steps.first, last + 1))
        self.alone = [index for index in range(len(segment.steps)) if index not in inside]
        self.done: list[tuple[int, list[int]]] = []
        drops = _last_uses(segment)
        for index in range(len(segment.steps)):
            if index in inside and index not in fused:
                continue
            first = fused[index].first if index in fused else index
            self.done.append((index, [*itertools.chain.from_iterable(drops[first : index + 1])]))


class _AtPoint:
    """A segment's steps at one point, with the weights materialized once for all blocks of rows."""

    def __init__(
        self,
        program: Program,
        segment: Segment,
        point: int,
        order: _Order,
        values: Values,
        rows: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._program, self._segment, self._point = program, segment, point
        self._order, self._fused, self._values, self._rows = order, order.fused, values, rows
        self._weights: dict[int, list[Tensor]] = {}
        for index in order.alone:
            entries = segment.steps[index].entries
            self._weights[index] = [_entry_at(entry, point) for entry in entries]
        self._unbatched: dict[int, Any] = {}  # values that do not depend on the rows

    def output(self, block: slice) -> Any:
        """The network's output for a block of rows."""
        return self._program.graph.fill_output(self.values(block))

    def values(self, block: slice) -> dict[int, Any]:
        """The values of the segment's outputs for a block of rows."""
        done: dict[int, Any] = dict(self._unbatched)
        for index, read in self._order.done:
            if index in done:
                continue
            done[index] = self._value(index, block, done)
            if not self._segment.steps[index].node.batched:
                self._unbatched[index] = done[index]
            # Memory that is used again is memory that is still in the cache.
            for i in read:
                done.pop(i, None)
        outputs = {}
        for node, form in self._segment.outputs.items():
            if isinstance(form, Varying):
                outputs[node] = done[form.step]
            else:
                outputs[node] = self._combined(form, block)
        return outputs

    def _value(self, index: int, block: slice, done: dict[int, Any]) -> Any:
        step = self._segment.steps[index]
        if index in self._fused:
            constant = functools.partial(self._constant, block=block)
            return self._fused[index].run(self._point, constant, done)
        if step.combine is not None:
            return self._combined(step.combine, block)
        inputs = [done[i] if isinstance(i, int) else self._combined(i, block) for i in step.inputs]
        program = self._program
        with program.noise.of(program.graph, step.node, block.start, self._device):
            return step.node.run(inputs, self._weights[index], block.stop - block.start)

    def _constant(self, number: int, block: slice) -> Any:
        """A shared value, cut down to a block of rows."""
        batched = self._program.shared[number].node.batched
        whole = block.stop - block.start == self._rows or not batched
        return self._values[number] if whole else self._values[number][block]

    def _combined(self, form: Combination, block: slice) -> Any:
        terms = [self._constant(term.value, block) for term in form.terms]
        return blend(terms, [term.coefficients[self._point] for term in form.terms])


def _sums_of_combination(
    form: Combination, values: Values, targets: Tensor, head: Head, tick: Tick
) -> Tensor:
    """Sums for outputs that are combinations; equal outputs in a row are summed once."""
    # Rows along the fast axis: the head reduces over few classes and many rows.
    terms = [values[term.value] for term in form.terms]
    terms = [_columns_apart(value) for value in terms]
    sums = head.zeros(len(form.terms[0].coefficients), targets.device)
    before: list[float] = []
    for point in range(len(sums)):
        row = [float(term.coefficients[point]) for term in form.terms]
        if row == before:
            sums[point] = sums[point - 1]
        else:
            sums[point] = head.sums(blend(terms, row), targets)
        before = row
        tick()
    return sums


def _columns_apart(value: Any) -> Any:
    matrix = isinstance(value, Tensor) and value.dim() == 2
    return value.t().contiguous().t() if matrix else value


def _entry_at(entry: Tensor | Moving, point: int) -> Tensor:
    return entry if isinstance(entry, Tensor) else entry.at(point)


def _channels_last(x: Tensor) -> Tensor:
    """Images with a pixel's channels together: convolutions are faster so, and keep the layout."""
    if x.dim() == 4 and x.is_floating_point():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def _last_uses(segment: Segment) -> list[list[int]]:
    """For each step, the earlier ones whose value nothing reads after it."""
    last: dict[int, int] = {}
    for index, step in enumerate(segment.steps):
        last.update({i: index for i in step.inputs if isinstance(i, int)})
    for form in segment.outputs.values():
        if isinstance(form, Varying):
            last.pop(form.step, None)
    drops: list[list[int]] = [[] for _ in segment.steps]
    for i, index in last.items():
        drops[index].append(i)
    return drops
