"""Native backend: subgraphs that the C++ engine has run fused in it, all else as in the reference.

A segment that is one subgraph (backends/native/partition.py) runs down to the sums of the head, for
blocks of samples that stay in the cache. In any other segment the steps outside of subgraphs run
one by one, a block of rows at a time, and each subgraph between them is one call for the block. The
reference backend also computes the shared values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.base import Request, Sums, Tick, Values, attempt
from modeconn.backends.blocking import block_rows
from modeconn.backends.native import extension as native
from modeconn.backends.native.layers import Given
from modeconn.backends.native.partition import Subgraph, subgraphs, whole_subgraph
from modeconn.backends.reference import FusedSteps, ReferenceBackend
from modeconn.errors import Unsupported
from modeconn.metrics import Head
from modeconn.plan.program import SHARED, Segment, Term, VaryingStep, shared_steps
from modeconn.plan.units import static

# Points of one call into the engine: few enough that progress moves, many enough to fill the cores.
_POINTS = 16
# The same where only outputs are combined, which takes next to no time per point.
_POINTS_OF_OUTPUTS = 256
# Elements behind each row of images: rows a multiple of 4 KiB apart share sets of the cache.
_APART = 80
# Images of a call for one subgraph at one point, for each thread: with fewer, some of the threads
# have nothing to do.
_ROWS_OF_A_THREAD = 32
_SUMS = Sums(
    losses=("cross_entropy", "mse", "bce"), columns={"loss": 0, "error": 1, "top5_error": 2}
)


@dataclass
class FusedSubgraph:
    """A subgraph for one block of rows at one point: see `FusedSteps`."""

    subgraph: Subgraph
    last: VaryingStep
    dtype: torch.dtype

    @property
    def first(self) -> int:
        return self.subgraph.first

    def run(
        self, point: int, constant: Callable[[int], Tensor], done: Mapping[int, Tensor]
    ) -> Tensor:
        steps = self.subgraph.steps

        def given(terms: tuple[Term, ...], step: int | None) -> tuple[list[np.ndarray], np.ndarray]:
            if step is None:
                values = [constant(term.value) for term in terms]
                columns = [term.coefficients for term in terms]
            else:
                values, columns = [done[step]], [np.ones(point + 1)]
            rows = [_rows(value, self.dtype, steps.features_last) for value in values]
            return rows, np.stack(columns, axis=1)

        at = slice(point, point + 1)
        terms, columns = given(steps.terms, steps.step)
        shape = self.last.node.shape
        image = len(shape) == 4 and not steps.features_last
        features = [static(size) for size in (shape[1:] if image else shape[-1:])]
        width, apart = int(np.prod(features)), _APART if image else 0
        out = torch.empty((1, len(terms[0]), width + apart), dtype=self.dtype)[:, :, :width]
        native.extension().chain_outputs(
            terms,
            columns[at],
            [layer.at(at, given) for layer in steps.layers],
            out.numpy(),
            activation=steps.activation.name,
            slope=steps.activation.slope,
            threads=torch.get_num_threads(),
            **native.switches(),
        )
        if not image:
            return out.reshape(-1, *map(static, shape[1:]))
        value: Tensor = out[0].unflatten(1, features)
        # PyTorch has convolutions of its own for channels that lie together, but not in float64.
        as_it_is = self.dtype == torch.float64
        return value if as_it_is else value.contiguous(memory_format=torch.channels_last)


@dataclass
class _Lowered:
    """The subgraphs of a program's segments, by the segments' index.

    Attributes:
        whole: of segments that are one subgraph.
        fused: those between steps of the reference backend, by their last step.
        kept: shared values that subgraphs read, and perhaps no segment.
        images: whether a subgraph that is no whole segment goes through convolutions.
    """

    whole: dict[int, Subgraph] = field(default_factory=dict)
    fused: dict[int, dict[int, FusedSteps]] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    images: bool = False


def _lower(request: Request) -> _Lowered:
    """Lowers every segment.

    Raises:
        Unsupported: the engine takes no subgraph; the reason is that of the first segment.
    """
    program, lowered, reasons = request.program, _Lowered(), []
    for segment in program.segments:
        whole = attempt(functools.partial(whole_subgraph, program, segment))
        if isinstance(whole, Unsupported):
            reasons.append(whole)
            found = subgraphs(program, segment)
            taken = [each for each in found if request.named or each.pays(segment)]
            lowered.images |= any(each.steps.images for each in taken)
        else:
            lowered.whole[segment.index] = whole
            taken = [whole]
        lowered.fused[segment.index] = {
            each.last: FusedSubgraph(each, segment.steps[each.last], request.dtype)
            for each in taken
            if each.last >= 0  # a combination has no step
        }
        # A subgraph may begin with another value than the planner's: the input of a layer that has
        # a norm behind it.
        for each in taken:
            lowered.kept |= each.steps.shared()
    if not lowered.whole and not any(lowered.fused.values()):
        raise reasons[0]
    if request.dtype == torch.float64:
        _lower_shared(request, lowered)
    return lowered


def _lower_shared(request: Request, lowered: _Lowered) -> None:
    """Lowers convolutions among the shared values: PyTorch has no kernels of float64 for them."""
    program = request.program
    if not any(program.shared[number].node.op == "conv2d" for number in program.order):
        return
    steps = shared_steps(program, lowered.kept.union(program.kept()))
    taken = [each for each in subgraphs(program, steps) if each.pays_alone(steps)]
    lowered.images |= bool(taken)
    lowered.fused[SHARED] = {
        each.last: FusedSubgraph(each, steps.steps[each.last], request.dtype) for each in taken
    }


class NativeBackend(ReferenceBackend):
    """Runs subgraphs in the C++ engine and everything else as the reference backend does."""

    name = "native"

    def __init__(self, request: Request) -> None:
        lowered = _lower(request)
        fewest = _ROWS_OF_A_THREAD * torch.get_num_threads() if lowered.images else 0
        super().__init__(
            request.program,
            request.dtype,
            request.device,
            kept=lowered.kept,
            fused=lowered.fused,
            block=block_rows(request.program, request.dtype, request.device, fewest=fewest),
        )
        self._dtype = request.dtype
        self._whole = lowered.whole

    @classmethod
    def supports(cls, request: Request) -> None:
        """Checks that the device is the CPU and that the extension loads."""
        if request.device.type != "cpu":
            raise Unsupported(f"it computes on the CPU, and the device is {request.device}")
        if not native.available():
            raise Unsupported(f"the C++ extension is not available: {native.reason()}")

    @classmethod
    def create(cls, request: Request) -> NativeBackend:
        """Makes the backend; unless it is named, parts of segments run in it where they pay."""
        return cls(request)

    def sums(
        self, segment: Segment, values: Values, targets: Tensor, head: Head, tick: Tick
    ) -> Tensor:
        whole = self._whole.get(segment.index)
        if whole is None or not _SUMS.cover(head) or whole.steps.constant:
            return super().sums(segment, values, targets, head, tick)
        steps = whole.steps
        given = given_values(values, self._dtype, steps.features_last)
        terms, columns = given(steps.terms, None)
        sums = head.zeros(len(segment.point_indices), targets.device)
        together = _POINTS if steps.layers else _POINTS_OF_OUTPUTS
        for start in range(0, len(sums), together):
            points = slice(start, min(start + together, len(sums)))
            part = native.extension().chain_sums(
                terms,
                columns[points],
                [layer.at(points, given) for layer in steps.layers],
                targets.contiguous().numpy(),
                loss=head.loss,
                top5="top5_error" in head.names,
                activation=steps.activation.name,
                slope=steps.activation.slope,
                threads=torch.get_num_threads(),
                **native.switches(),
            )
            sums[points] = torch.from_numpy(part[:, _SUMS.of(head)])
            tick(points.stop - points.start)
        return sums


def given_values(values: Values, dtype: torch.dtype, features_last: bool = False) -> Given:
    """Shared values as the step graph of a whole segment takes them."""

    def given(terms: tuple[Term, ...], step: int | None) -> tuple[list[np.ndarray], np.ndarray]:
        columns = np.stack([term.coefficients for term in terms], axis=1)
        return [_rows(values[term.value], dtype, features_last) for term in terms], columns

    return given


def _rows(value: Tensor, dtype: torch.dtype, features_last: bool) -> np.ndarray:
    """A value as the engine takes it: images, or rows of what its last axis holds."""
    axes = (2,) if features_last else (2, 4)
    value = (value if value.dim() in axes else value.reshape(-1, value.shape[-1])).to(dtype)
    rows_apart = len(value) > 0 and value[0].is_contiguous()
    array: np.ndarray = (value if rows_apart else value.contiguous()).numpy()
    return array
