"""The reference backend: plain PyTorch, every dtype and device, and the definition that the others are tested against.

Shared values are computed once per batch. Then, for each point, the weights are formed once and
blocks of rows, small enough for their activations to stay in the cache, go through all the steps
down to the sums of the head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from modeconn.backends.blocking import block_rows
from modeconn.data.inputs import Inputs
from modeconn.metrics import Head
from modeconn.parameters.paths import blend
from modeconn.plan.program import Combination, Program, Segment, Varying

# The shared values of one batch, by number.
Values = dict[int, Any]


class FusedSteps(Protocol):
    """Steps `first` to a last one, of which only the last one's value is needed by others."""

    @property
    def first(self) -> int:
        """The first of the steps."""

    def run(self, point: int, constant: Callable[[int], Tensor], done: dict[int, Tensor]) -> Tensor:
        """The last step's value, from shared values, by number, and those of earlier steps."""


class ReferenceBackend:
    """Runs a program on batches of rows.

    Args:
        program: what to run.
        dtype, device: of the computation.
    """

    name = "reference"

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device) -> None:
        self.program = program
        self._kept = set(program.kept())
        self._block = block_rows(program, dtype, device)
        self._item = torch.finfo(dtype).bits // 8

    def most_rows(self, budget: int) -> int:
        """Rows to take at a time, so that the shared values kept for them fit a budget of bytes.

        Blocks of rows are cut out of shared values along their first axis. Where some value has
        another first axis (tokens folded into the batch, say), a batch must be one block.
        """
        steps = [self.program.shared[number] for number in self._kept]
        kept = sum(step.numel for step in steps if step.node.batched) * self._item
        rows = max(self._block, int(budget // max(kept, 1.0)))
        sliceable = all(
            str(step.node.shape[0]) == "N"
            for step in steps
            if step.node.batched and step.node.shape
        )
        return rows if sliceable else min(rows, self._block)

    def shared(self, x: Inputs) -> Values:
        """The shared values of a batch that the segments take up."""
        inputs = [_laid_out(tensor) for tensor in self.program.graph.given(x)]
        parts: dict[int, list[Any]] = {}
        for rows in self._blocks(len(inputs[0])):
            values: Values = {number: tensor[rows] for number, tensor in enumerate(inputs)}
            for number in self.program.order:
                step = self.program.shared[number]
                if number >= len(inputs):
                    values[number] = step.node.run(
                        [values[i] for i in step.inputs], step.entries, rows.stop - rows.start
                    )
                if number in self._kept:
                    parts.setdefault(number, []).append(values[number])
        batched = {number: self.program.shared[number].node.batched for number in parts}
        return {
            number: part[0] if len(part) == 1 or not batched[number] else torch.cat(part)
            for number, part in parts.items()
        }

    def sums(
        self,
        segment: Segment,
        values: Values,
        targets: Tensor,
        head: Head,
        tick: Callable[[], None],
    ) -> Tensor:
        """The head's sums over a batch at each of the segment's points, float64 [T, metrics].

        Args:
            values: what `shared` returned for the batch.
            tick: called after each point.
        """
        whole = self.program.graph.tensor_output
        form = segment.outputs[whole] if whole is not None else None
        if isinstance(form, Combination):
            return self._combined(form, values, targets, head, tick)
        sums = head.zeros(len(segment.point_indices), targets.device)
        for point in range(len(segment.point_indices)):
            for rows, outputs in self.outputs(segment, point, values, len(targets)):
                sums[point] += head.sums(outputs, targets[rows])
            tick()
        return sums

    def _combined(
        self,
        form: Combination,
        values: Values,
        targets: Tensor,
        head: Head,
        tick: Callable[[], None],
    ) -> Tensor:
        """Outputs that are combinations: nothing of the network is left to do, and equal outputs are summed once."""
        # Rows along the fast axis: the head reduces over few classes and many rows.
        terms = [values[term.value] for term in form.terms]
        terms = [v.t().contiguous().t() if v.dim() == 2 else v for v in terms]
        sums = head.zeros(len(form.terms[0].coefficients), targets.device)
        before: list[float] = []
        for point in range(len(sums)):
            row = [float(term.coefficients[point]) for term in form.terms]
            sums[point] = (
                sums[point - 1] if row == before else head.sums(blend(terms, row), targets)
            )
            before = row
            tick()
        return sums

    def all_outputs(
        self, segment: Segment, values: Values, rows: int
    ) -> Iterator[tuple[int, slice, Any]]:
        """The network's output at every point, a block of rows at a time; of each point, the blocks come in their order."""
        for point in range(len(segment.point_indices)):
            for block, output in self.outputs(segment, point, values, rows):
                yield point, block, output

    def outputs(
        self, segment: Segment, point: int, values: Values, rows: int
    ) -> Iterator[tuple[slice, Any]]:
        """The network's output at one point, a block of rows at a time."""
        program, fused = self.program, self.fused(segment)
        within = {
            index for last, region in fused.items() for index in range(region.first, last + 1)
        }
        weights = [
            []
            if index in within
            else [e if isinstance(e, Tensor) else e.at(point) for e in step.entries]
            for index, step in enumerate(segment.steps)
        ]
        once: dict[int, Any] = {}  # values that have nothing to do with the rows
        dropped = _last_uses(segment)

        def constant(number: int, block: slice) -> Any:
            whole = block.stop - block.start == rows or not program.shared[number].node.batched
            return values[number] if whole else values[number][block]

        def combined(form: Combination, block: slice) -> Any:
            return blend(
                [constant(term.value, block) for term in form.terms],
                [term.coefficients[point] for term in form.terms],
            )

        for block in self._blocks(rows):
            done: dict[int, Any] = dict(once)
            for index, step in enumerate(segment.steps):
                if index in done or (index in within and index not in fused):
                    continue
                if index in fused:
                    done[index] = fused[index].run(
                        point, functools.partial(constant, block=block), done
                    )
                elif step.combine is not None:
                    done[index] = combined(step.combine, block)
                else:
                    inputs = [
                        done[i] if isinstance(i, int) else combined(i, block) for i in step.inputs
                    ]
                    done[index] = step.node.run(inputs, weights[index], block.stop - block.start)
                if not step.node.batched:
                    once[index] = done[index]
                first = fused[index].first if index in fused else index
                for i in (i for each in dropped[first : index + 1] for i in each):
                    # memory that is used again is memory that is still in the cache
                    done.pop(i, None)
            outputs = {
                node: done[form.step] if isinstance(form, Varying) else combined(form, block)
                for node, form in segment.outputs.items()
            }
            yield block, program.graph.fill_output(outputs)

    def fused(self, segment: Segment) -> dict[int, FusedSteps]:
        """Steps that run together, otherwise than one by one, by the last of them."""
        return {}

    def _blocks(self, rows: int) -> Iterator[slice]:
        step = rows if self.program.graph.mixes_rows else self._block
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))


def _laid_out(x: Tensor) -> Tensor:
    """Images with the channels of a pixel together: convolutions are faster so, and pass that layout on."""
    return (
        x.contiguous(memory_format=torch.channels_last)
        if x.dim() == 4 and x.is_floating_point()
        else x
    )


def _last_uses(segment: Segment) -> list[list[int]]:
    """For each step, the earlier ones whose value nobody needs after it."""
    last = {
        i: index
        for index, step in enumerate(segment.steps)
        for i in step.inputs
        if isinstance(i, int)
    }
    for form in segment.outputs.values():
        if isinstance(form, Varying):
            last.pop(form.step, None)
    drops: list[list[int]] = [[] for _ in segment.steps]
    for i, index in last.items():
        drops[index].append(i)
    return drops
