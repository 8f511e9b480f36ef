"""The Triton backend: a segment's steps for many points at once, by the kernels of `modeconn.kernels`.

Each segment is looked at once (backends/triton/segment.py). Then, batch by batch, its points go
through in chunks that fit the device's free memory: a linear layer, say, is one launch for all
points of a chunk. Weights of a point exist only inside the kernels, or for a chunk; logits never
leave them. What has no kernel is PyTorch's, for all points of the chunk where it can be. With
TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.backends.base import Request, Sums, Values
from modeconn.backends.blocking import MEMORY_BUDGET
from modeconn.backends.reference import ReferenceBackend
from modeconn.backends.triton import cuda_graphs as replay
from modeconn.backends.triton.schedule import Schedule, Scope, as_read
from modeconn.backends.triton.segment import Steps, Tail, find_tail
from modeconn.backends.triton.values import at, materialized
from modeconn.errors import Unsupported
from modeconn.kernels.blended import Blended
from modeconn.metrics import IGNORED, Head
from modeconn.plan.program import Combination, Program, Segment, Term, Varying

# Layers of no more units than this can be one kernel with the loss.
_WIDEST = 256
# Of the free memory, what the values of a chunk may take; the rest is for weights materialized for a
# chunk, and the next batch.
_SHARE = 0.5
# Kernels count the numbers of a tensor in 32 bits.
_MOST_NUMBERS = (1 << 31) - 1
# Work whose values are no more numbers than this is small: starting its kernels may take longer
# than they run.
_SMALL = 1 << 24
# Points of a chunk, at most: progress moves after each.
_MOST_POINTS = 256
_SUMS = Sums(
    losses=("cross_entropy", "next_token"),
    columns={"loss": 0, "error": 1, "top5_error": 2, "perplexity": 0},
)


class TritonBackend(ReferenceBackend):
    """Runs a program on a CUDA device, with Triton kernels for what takes the time.

    Products are of the requested precision, sums of float32 always. Where outputs are
    differentiated, kernels run linear layers alone, and weights are read anew for each batch.
    """

    name = "triton"

    def __init__(self, request: Request) -> None:
        program, device = request.program, request.device
        self._plans = {
            s.index: _SegmentPlan(program, s, device, request.precision, request.gradients)
            for s in program.segments
        }
        if not any(plan.kernels for plan in self._plans.values()):
            raise Unsupported("nothing that moves with t is a layer that there is a kernel for")
        kept: set[int] = set().union(*(plan.steps.kept for plan in self._plans.values()))
        super().__init__(program, request.dtype, device, kept=kept)
        self._device = device
        record = replay.recorder(device)
        self._replays = None if record is None else replay.Replays(record)
        self._budget = MEMORY_BUDGET
        nodes = [program.shared[number].node for number in self.kept]
        self._by_rows = not program.graph.mixes_rows and all(
            str(node.shape[0]) == "N" for node in nodes if node.batched
        )

    @classmethod
    def supports(cls, request: Request) -> None:
        """Checks the dtype, the device, and that Triton is installed."""
        reason = why_not(request.dtype, request.device)
        if reason:
            raise Unsupported(reason)

    @classmethod
    def create(cls, request: Request) -> TritonBackend:
        """Makes the backend, if there is a kernel for some step."""
        return cls(request)

    def most_rows(self, budget: int) -> int:
        self._budget = budget
        return super().most_rows(max(budget, int(self._free() / 4)))

    def sums(
        self,
        segment: Segment,
        values: Values,
        targets: Tensor,
        head: Head,
        tick: Callable[..., None],
    ) -> Tensor:
        plan = self._plans[segment.index]
        tail = (
            plan.tail if plan.tail is not None and _stands_in(head, plan.classes, targets) else None
        )
        schedule = plan.body if tail is not None else plan.whole
        count = plan.different if tail is not None else len(segment.point_indices)
        sums = head.zeros(count, targets.device)
        labels = _Labels(targets)
        for points, rows, scope in self._scopes(plan, schedule, count, values, len(targets)):
            if tail is None:
                schedule.run(scope)
                for point, output in enumerate(plan.outputs(scope)):
                    sums[points.start + point] += head.sums(
                        self.program.graph.fill_output(output), targets[rows]
                    )
            else:
                part = self._part(plan, tail, scope, labels, rows, top5="top5_error" in head.names)
                sums[points] += torch.stack([part[:, i] for i in _SUMS.of(head)], 1)
            if rows.stop == len(targets):
                tick(
                    points.stop * len(segment.point_indices) // count
                    - points.start * len(segment.point_indices) // count
                )
        return sums if count == len(segment.point_indices) else sums[plan.place]

    def _part(
        self, plan: _SegmentPlan, tail: Tail, scope: Scope, labels: _Labels, rows: slice, top5: bool
    ) -> Tensor:
        """The kernels' sums for a chunk of points and a block of rows, float64 [T, 3]; by a recording where that pays."""

        def work(scope: Scope, labels: _Labels, rows: slice) -> Tensor:
            plan.body.run(scope)
            return _loss(tail, scope, labels, rows, top5=top5, precision=plan.steps.precision)

        values = list(scope.shared.values())
        small = (
            scope.rows * (scope.points.stop - scope.points.start) * max(plan.body.numel, 1.0)
            <= _SMALL
        )
        if (
            self._replays is None
            or not small
            or labels.targets.dim() > 1
            or not all(isinstance(v, Tensor) for v in values)
        ):
            return work(scope, labels, rows)

        def again(given: Sequence[Tensor]) -> Tensor:
            shared = dict(zip(scope.shared, given))
            return work(
                Scope(scope.points, scope.rows, scope.coefficients, shared),
                _Labels(given[-1]),
                slice(None),
            )

        key = (plan.steps.segment.index, scope.points.start, scope.points.stop, top5)
        return self._replays.run(key, again, [*values, labels.targets[rows]])

    def all_outputs(
        self, segment: Segment, values: Values, rows: int
    ) -> Iterator[tuple[int, slice, Any]]:
        plan = self._plans[segment.index]
        for points, block, scope in self._scopes(
            plan, plan.whole, len(segment.point_indices), values, rows
        ):
            plan.whole.run(scope)
            for point, output in enumerate(plan.outputs(scope)):
                yield points.start + point, block, self.program.graph.fill_output(output)

    def _scopes(
        self, plan: _SegmentPlan, schedule: Schedule, count: int, values: Values, rows: int
    ) -> Iterator[tuple[slice, slice, Scope]]:
        """Chunks of points, and blocks of rows where a single point is too large."""
        item = torch.finfo(torch.float32).bits // 8
        per_row = max(schedule.numel, 1.0)
        at_once = min(
            int(_SHARE * self._free() / (item * per_row)),
            int(_MOST_NUMBERS / max(schedule.widest, 1.0)),
        )
        step = max(1, min(rows, at_once)) if self._by_rows else rows
        chunk = max(1, min(count, at_once // max(rows, 1), _MOST_POINTS))
        blocks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        cut = [values if len(blocks) == 1 else self._cut(values, block) for block in blocks]
        stacked: list[dict[int, Tensor]] = [{} for _ in blocks]
        for start in range(0, count, chunk):
            points = slice(start, min(start + chunk, count))
            for block, here, stack in zip(blocks, cut, stacked):
                yield (
                    points,
                    block,
                    Scope(points, block.stop - block.start, plan.steps.coefficients, here, stack),
                )

    def _cut(self, values: Values, block: slice) -> Values:
        nodes = {number: self.program.shared[number].node for number in values}
        return {
            number: pytree.tree_map(lambda part: part[block], value)
            if nodes[number].batched
            else value
            for number, value in values.items()
        }

    def _free(self) -> float:
        """Bytes that are free on the device; under the interpreter the caller's budget."""
        if self._device.type != "cuda":
            return self._budget
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        return float(torch.cuda.mem_get_info(self._device)[0] + cached)


class _SegmentPlan:
    """How a segment runs: all of its steps (`whole`), or those before the layers that are one kernel with the loss (`body`).

    Attributes:
        different: points with outputs of their own; the others have those of an equal point, at
            `place`.
        classes: shape of the output, of class logits.
        kernels: whether any kernel has a part in it.
    """

    def __init__(
        self,
        program: Program,
        segment: Segment,
        device: torch.device,
        precision: str,
        gradients: bool,
    ) -> None:
        self.steps = Steps(program, segment, device, precision, gradients)
        self.forms = {
            node: self.steps.source(form.step) if isinstance(form, Varying) else form
            for node, form in segment.outputs.items()
        }
        self.whole = Schedule(self.steps, list(self.forms.values()))
        self.tail, self.different = find_tail(self.steps, _WIDEST), len(segment.point_indices)
        self.place: slice | Tensor = slice(None)
        self.body, reads = self.whole, None
        self.classes: tuple[Any, ...] = ()
        if self.tail is not None:
            if isinstance(self.tail.reads, Combination) and not self.tail.layers:
                self._merge_equal_points(self.tail)
            self.body = Schedule(self.steps, [self.tail.reads])
            self.classes = program.graph.nodes[program.graph.tensor_output].shape  # type: ignore[index]
            reads = self.tail.reads
        of_tail = self.tail is not None and (
            bool(self.tail.layers) or isinstance(reads, Combination)
        )
        self.kernels = of_tail or any(call.kernel for call in self.whole.calls)

    def _merge_equal_points(self, tail: Tail) -> None:
        terms = tail.reads.terms  # type: ignore[union-attr]
        columns, place = np.unique(
            np.stack([term.coefficients for term in terms], 1), axis=0, return_inverse=True
        )
        self.different, self.place = (
            len(columns),
            torch.from_numpy(place.reshape(-1)).to(self.steps.device),
        )
        tail.reads = Combination(
            tuple(Term(term.value, column) for term, column in zip(terms, columns.T))
        )

    def outputs(self, scope: Scope) -> Iterator[dict[int, Any]]:
        """The values that the output is made of, point by point."""
        values = {node: materialized(scope.read(form)) for node, form in self.forms.items()}
        for point in range(scope.points.stop - scope.points.start):
            yield {node: at(value, point) for node, value in values.items()}


class _Labels:
    """A batch's labels, and which of them count."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.kept: Tensor | None = None
        if targets.dim() > 1:
            kept = targets != IGNORED
            self.kept = None if bool(kept.all()) else kept

    def of(self, x: Tensor | Blended, rows: slice) -> tuple[Tensor | Blended, Tensor]:
        """The labels of some rows [M], and a value [..., N, features] or [..., N, length, features] as [..., M, features]."""
        labels = self.targets[rows]
        if labels.dim() == 1:
            return x, labels
        tensor = x.tensors if isinstance(x, Blended) else x
        # a text's last token predicts nothing
        tensor = tensor.narrow(-2, 0, labels.shape[1]).flatten(-3, -2)
        labels = labels.flatten()
        if self.kept is not None:
            which = self.kept[rows].flatten()
            tensor, labels = tensor[..., which, :], labels[which]
        return Blended(tensor, x.coefficients) if isinstance(x, Blended) else tensor, labels


def _loss(tail: Tail, scope: Scope, labels: _Labels, rows: slice, **options: Any) -> Tensor:
    """Sums over the rows of loss, error and top-5 error at each point, float64 [T, 3]."""
    from modeconn.kernels.path_cross_entropy import path_cross_entropy

    x, more = as_read(scope.read(tail.reads))
    x, targets = labels.of(x, rows)
    options |= more
    if not tail.layers:  # the same logits at all points come as those of one
        logits = x[None] if isinstance(x, Tensor) and x.dim() == 2 else x
        of_logits: Tensor = path_cross_entropy(logits, None, None, targets, **options)
        return of_logits
    layers = [
        (layer.weight.blended(scope.points), layer.bias and layer.bias.blended(scope.points))
        for layer in tail.layers
    ]
    if len(layers) == 1:
        of_layer: Tensor = path_cross_entropy(x, *layers[0], targets, **options)
        return of_layer
    from modeconn.kernels.path_mlp import PathLayer, path_mlp

    chain = [
        PathLayer(weight, bias, layer.activation, layer.slope)
        for (weight, bias), layer in zip(layers, tail.layers)
    ]
    of_chain: Tensor = path_mlp(x, chain, targets, **options)
    return of_chain


def _stands_in(head: Head, classes: Sequence[Any], targets: Tensor) -> bool:
    """Whether the kernels' sums are those of the head."""
    if not _SUMS.cover(head):
        return False
    if targets.dim() == 1:
        return len(classes) == 2
    longer = 1 if head.loss == "next_token" else 0
    return targets.dim() == 2 and len(classes) == 3 and classes[1] == targets.shape[1] + longer


def why_not(dtype: torch.dtype, device: torch.device) -> str:
    """Why the kernels cannot run on a device, in one line; "" where they can."""
    if dtype != torch.float32:
        return f"its kernels compute in float32, tf32 or bf16, and the precision is {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not (interpreted() and device.type == "cpu"):
        there = "there is no CUDA device" if not torch.cuda.is_available() else 'pass device="cuda"'
        return f"it needs a CUDA device, and the device is {device}: {there}"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'modeconn[gpu]'"
    return ""


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one Python call per operation."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
