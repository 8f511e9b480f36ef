"""The Triton backend: a segment's steps for many points at once, by GPU kernels (modeconn.kernels).

Each segment is analysed once (backends/triton/segment.py). Then, batch by batch, its points go
through in chunks that fit the device's free memory: a linear layer, say, is one launch for all
points of a chunk. Weights of a point exist only inside the kernels, or for a chunk; logits never
leave them. Operations without a kernel run in PyTorch, for all points of the chunk at once where
they can. With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, slowly, for
tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.backends.base import Request, Sums, Tick, Values
from modeconn.backends.blocking import MEMORY_BUDGET
from modeconn.backends.reference import ReferenceBackend
from modeconn.backends.triton import cuda_graphs
from modeconn.backends.triton.schedule import Chunk, ChunkSchedule
from modeconn.backends.triton.segment import Epilogue, SegmentSteps, find_epilogue
from modeconn.backends.triton.values import as_read, at, materialized
from modeconn.data.inputs import Inputs
from modeconn.errors import Unsupported, warn
from modeconn.kernels.blended import Blended
from modeconn.metrics import IGNORED, Head
from modeconn.plan.program import Combination, Segment, Term, Varying

# Layers of no more units than this can be one kernel with the loss: path_mlp's limit.
_WIDEST = 256
# Of the free memory, the share for the values of a chunk; the rest is for weights that are
# materialized for a chunk, and the next batch.
_SHARE = 0.5
# Kernels index the values of a tensor with 32 bits.
_MOST_NUMEL = (1 << 31) - 1
# Work on no more values than this is small: starting its kernels may take longer than they run.
_SMALL = 1 << 24
# Points of a chunk, at most: progress moves after each.
_MOST_POINTS = 256
_SUMS = Sums(
    losses=("cross_entropy", "next_token"),
    columns={"loss": 0, "error": 1, "top5_error": 2, "perplexity": 0},
)


class TritonBackend:
    """Runs a program on a CUDA device, with Triton kernels for what takes the time.

    Products are of the requested precision, sums of float32 always. Where outputs are
    differentiated, kernels run linear layers alone, and weights are read anew for each batch.

    Raises:
        Unsupported: no step of the program has a kernel.
    """

    name = "triton"

    def __init__(self, request: Request) -> None:
        self.program, self._device = request.program, request.device
        self._plans = {
            segment.index: _SegmentPlan(request, segment) for segment in self.program.segments
        }
        if not any(plan.kernels for plan in self._plans.values()):
            raise Unsupported("nothing that moves with t is a layer that there is a kernel for")
        kept: set[int] = set().union(*(plan.steps.kept for plan in self._plans.values()))
        # What all points share runs once, in PyTorch.
        self._shared = ReferenceBackend(self.program, request.dtype, self._device, kept=kept)
        record = cuda_graphs.recorder(self._device)
        self._replays = None if record is None else cuda_graphs.Replays(record)
        self._budget = MEMORY_BUDGET
        nodes = [self.program.shared[number].node for number in self._shared.kept]
        self._by_rows = not self.program.graph.mixes_rows and all(
            str(node.shape[0]) == "N" for node in nodes if node.batched
        )

    @classmethod
    def supports(cls, request: Request) -> None:
        """Checks the dtype, the device, and that Triton is installed and can build a kernel."""
        reason = why_not(request.dtype, request.device)
        if reason:
            raise Unsupported(reason)
        from modeconn.kernels.launch import why_not_built

        failure = why_not_built(request.device)
        if not failure:
            return
        reason = f"no kernel can be built here, by the C compiler of the environment ({failure})"
        if not request.named:
            warn(f"the GPU kernels are left out, and PyTorch computes instead: {reason}")
        raise Unsupported(reason)

    @classmethod
    def create(cls, request: Request) -> TritonBackend:
        """Makes the backend, if there is a kernel for some step."""
        return cls(request)

    def most_rows(self, budget: int) -> int:
        """Rows to take at a time: shared values fit the budget, or a quarter of free memory."""
        self._budget = budget
        return self._shared.most_rows(max(budget, int(self._free() / 4)))

    def shared(self, x: Inputs) -> Values:
        """The shared values of a batch that the segments read."""
        return self._shared.shared(x)

    def sums(
        self, segment: Segment, values: Values, targets: Tensor, head: Head, tick: Tick
    ) -> Tensor:
        """The head's sums over a batch at each of the segment's points, float64 [T, metrics]."""
        plan = self._plans[segment.index]
        total = len(segment.point_indices)
        fused = plan.epilogue is not None and _sums_head(head, plan.classes, targets)
        schedule, count = (plan.body, plan.different) if fused else (plan.whole, total)
        sums = head.zeros(count, targets.device)
        labels = _Labels(targets)
        for chunk, rows in self._chunks(plan, schedule, count, values, len(targets)):
            if fused:
                part = self._epilogue_sums(plan, chunk, labels, rows, "top5_error" in head.names)
                # Slices, as a list of columns would be copied to the device and waited for.
                sums[chunk.points] += torch.stack([part[:, i] for i in _SUMS.of(head)], 1)
            else:
                for point, output in self._outputs(plan, chunk):
                    sums[point] += head.sums(output, targets[rows])
            if rows.stop == len(targets):
                done, before = chunk.points.stop * total, chunk.points.start * total
                tick(done // count - before // count)
        return sums[plan.place] if fused else sums

    def all_outputs(
        self, segment: Segment, values: Values, rows: int
    ) -> Iterator[tuple[int, slice, Any]]:
        """The network's output: (point, block of rows, output); blocks of a point come in order."""
        plan = self._plans[segment.index]
        count = len(segment.point_indices)
        for chunk, block in self._chunks(plan, plan.whole, count, values, rows):
            for point, output in self._outputs(plan, chunk):
                yield point, block, output

    def _outputs(self, plan: _SegmentPlan, chunk: Chunk) -> Iterator[tuple[int, Any]]:
        """Yields the network's output at each point of a chunk."""
        plan.whole.run(chunk)
        for point, output in enumerate(plan.outputs(chunk)):
            yield chunk.points.start + point, self.program.graph.fill_output(output)

    def _epilogue_sums(
        self, plan: _SegmentPlan, chunk: Chunk, labels: _Labels, rows: slice, top5: bool
    ) -> Tensor:
        """Returns the kernels' sums for a chunk, float64 [T, 3]; by a recording where that pays."""
        values = list(chunk.shared.values())
        small = chunk.rows * chunk.count * max(plan.body.numel, 1.0) <= _SMALL
        plain = labels.targets.dim() == 1 and all(isinstance(v, Tensor) for v in values)
        if self._replays is None or not small or not plain:
            return plan.epilogue_sums(chunk, labels, rows, top5)

        def again(given: Sequence[Tensor]) -> Tensor:
            shared = dict(zip(chunk.shared, given))
            here = Chunk(chunk.points, chunk.rows, chunk.coefficients, shared)
            return plan.epilogue_sums(here, _Labels(given[-1]), slice(None), top5)

        key = (plan.steps.segment.index, chunk.points.start, chunk.points.stop, top5)
        return self._replays.run(key, again, [*values, labels.targets[rows]])

    def _chunks(
        self, plan: _SegmentPlan, schedule: ChunkSchedule, count: int, values: Values, rows: int
    ) -> Iterator[tuple[Chunk, slice]]:
        """Yields chunks of points, and blocks of rows where a single point is too large."""
        item = torch.finfo(torch.float32).bits // 8
        by_memory = _SHARE * self._free() / (item * max(schedule.numel, 1.0))
        at_once = min(int(by_memory), int(_MOST_NUMEL / max(schedule.widest, 1.0)))
        step = max(1, min(rows, at_once)) if self._by_rows else rows
        length = max(1, min(count, at_once // max(rows, 1), _MOST_POINTS))
        blocks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        cut = [values if len(blocks) == 1 else self._cut(values, block) for block in blocks]
        stacked: list[dict[int, Tensor]] = [{} for _ in blocks]
        for start in range(0, count, length):
            points = slice(start, min(start + length, count))
            for block, here, stack in zip(blocks, cut, stacked):
                size = block.stop - block.start
                yield Chunk(points, size, plan.steps.coefficients, here, stack), block

    def _cut(self, values: Values, block: slice) -> Values:
        """Cuts shared values down to a block of rows."""
        found = dict(values)
        for number, value in values.items():
            if self.program.shared[number].node.batched:
                found[number] = pytree.tree_map(lambda part: part[block], value)
        return found

    def _free(self) -> float:
        """Bytes that are free on the device; under the interpreter the caller's budget."""
        if self._device.type != "cuda":
            return self._budget
        cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        return float(torch.cuda.mem_get_info(self._device)[0] + cached)


class _SegmentPlan:
    """The schedules of a segment: of all its steps, and of those before the epilogue.

    Attributes:
        whole: the operations that compute the output.
        body: those that compute what the epilogue reads.
        epilogue: the layers that are one kernel with the loss, if there are any.
        different: the number of points with outputs of their own; the others have those of an equal
            point, at `place`.
        classes: shape of the output, of class logits.
        kernels: whether any kernel has a part in it.
    """

    def __init__(self, request: Request, segment: Segment) -> None:
        program = request.program
        self.steps = SegmentSteps(
            program, segment, request.device, request.precision, request.gradients
        )
        self.forms = {
            node: self.steps.source(form.step) if isinstance(form, Varying) else form
            for node, form in segment.outputs.items()
        }
        self.whole = ChunkSchedule(self.steps, list(self.forms.values()))
        self.body = self.whole
        self.different = len(segment.point_indices)
        self.place: slice | Tensor = slice(None)
        self.classes: tuple[Any, ...] = ()
        self.kernels = any(operation.kernel for operation in self.whole.operations)
        self.epilogue = find_epilogue(self.steps, _WIDEST)
        if self.epilogue is not None:
            reads = self.epilogue.reads
            if isinstance(reads, Combination):
                self.kernels = True
                if not self.epilogue.layers:
                    self.epilogue = Epilogue(self._different_points(reads))
            self.kernels = self.kernels or bool(self.epilogue.layers)
            self.body = ChunkSchedule(self.steps, [self.epilogue.reads])
            self.classes = program.graph.nodes[program.graph.tensor_output].shape  # type: ignore[index]

    def _different_points(self, logits: Combination) -> Combination:
        """Returns logits at the points with coefficients of their own."""
        rows = np.stack([term.coefficients for term in logits.terms], 1)
        different, place = np.unique(rows, axis=0, return_inverse=True)
        self.different = len(different)
        self.place = torch.from_numpy(place.reshape(-1)).to(self.steps.device)
        terms = zip(logits.terms, different.T)
        return Combination(tuple(Term(term.value, column) for term, column in terms))

    def outputs(self, chunk: Chunk) -> Iterator[dict[int, Any]]:
        """Yields the values that the output is made of, point by point."""
        values = {node: materialized(chunk.read(form)) for node, form in self.forms.items()}
        for point in range(chunk.count):
            yield {node: at(value, point) for node, value in values.items()}

    def epilogue_sums(self, chunk: Chunk, labels: _Labels, rows: slice, top5: bool) -> Tensor:
        """Returns the sums over rows of loss, error and top-5 error, float64 [T, 3]."""
        from modeconn.kernels.path_cross_entropy import path_cross_entropy
        from modeconn.kernels.path_mlp import PathLayer, path_mlp

        assert self.epilogue is not None
        self.body.run(chunk)
        x, options = as_read(chunk.read(self.epilogue.reads))
        x, targets = labels.of(x, rows)
        options |= {"top5": top5, "precision": self.steps.precision}
        sums: Tensor
        if not self.epilogue.layers:  # the same logits at all points come as those of one
            logits = x[None] if isinstance(x, Tensor) and x.dim() == 2 else x
            sums = path_cross_entropy(logits, None, None, targets, **options)
            return sums
        layers = [
            PathLayer(
                layer.weight.blended(chunk.points),
                layer.bias and layer.bias.blended(chunk.points),
                layer.activation.name,
                layer.activation.slope,
            )
            for layer in self.epilogue.layers
        ]
        if len(layers) == 1:
            (layer,) = layers
            sums = path_cross_entropy(x, layer.weight, layer.bias, targets, **options)
        else:
            sums = path_mlp(x, layers, targets, **options)
        return sums


class _Labels:
    """A batch's labels, without those that are ignored."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets
        self.kept: Tensor | None = None
        if targets.dim() > 1:
            kept = targets != IGNORED
            self.kept = None if bool(kept.all()) else kept

    def of(self, x: Tensor | Blended, rows: slice) -> tuple[Tensor | Blended, Tensor]:
        """Returns a value and the labels of some rows, tokens as rows of their own.

        Args:
            x: [..., N, features] or [..., N, length, features].

        Returns:
            The value as [..., M, features], and the labels [M].
        """
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
        return (Blended(tensor, x.coefficients) if isinstance(x, Blended) else tensor), labels


def _sums_head(head: Head, classes: Sequence[Any], targets: Tensor) -> bool:
    """Whether the kernels' sums are those of the head."""
    if not _SUMS.cover(head):
        return False
    if targets.dim() == 1:
        return len(classes) == 2
    if targets.dim() != 2 or len(classes) != 3:
        return False
    if head.loss == "next_token":
        return bool(classes[1] == targets.shape[1] + 1)
    # with as many classes as places the classes are on axis 1, as in PyTorch's losses
    return bool(classes[1] == targets.shape[1] != classes[2])


def why_not(dtype: torch.dtype, device: torch.device) -> str:
    """Returns why the kernels cannot run on a device, in one line; "" where they can."""
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        return f"its kernels compute in float32, tf32 or bf16, and the precision is {name}"
    if device.type != "cuda" and not (interpreted() and device.type == "cpu"):
        there = "there is no CUDA device" if not torch.cuda.is_available() else 'pass device="cuda"'
        return f"it needs a CUDA device, and the device is {device}: {there}"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'modeconn[gpu]'"
    return ""


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one Python call per operation."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
