"""The native backend: what the C++ engine knows of a segment runs fused in it, the rest as the reference backend does it.

A segment that is one region (see backends/native/partition.py) runs down to the sums of the head,
for blocks of samples that stay in the cache. In any other segment the steps outside of regions run
one by one, a block of rows at a time, and each region between them is one call for the block. The
reference backend also computes the shared values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.blocking import block_rows
from modeconn.backends.native import extension as native
from modeconn.backends.native.layers import Given
from modeconn.backends.native.partition import Region, find_region, find_regions
from modeconn.backends.reference import FusedSteps, ReferenceBackend, Values
from modeconn.errors import CannotRun
from modeconn.metrics import Head
from modeconn.plan.program import Program, Segment, Term, VaryingStep
from modeconn.plan.units import static

# Points of one call into the engine: few enough that progress moves, many enough to fill the cores.
_POINTS = 16
# Images of a call for one region at one point, for each thread: fewer leave some of the threads
# with nothing to do.
_ROWS_OF_A_THREAD = 32
# The same where only outputs are combined.
_POINTS_OF_OUTPUTS = 256
# The engine's sums, by the names that a head has for them.
_SUMS = {"loss": 0, "error": 1, "top5_error": 2}


@dataclass
class Fused:
    """A region for one block of rows at one point: see `FusedSteps`."""

    region: Region
    last: VaryingStep
    dtype: torch.dtype

    @property
    def first(self) -> int:
        return self.region.first

    def run(
        self, point: int, constant: Callable[[int], Tensor], done: Mapping[int, Tensor]
    ) -> Tensor:
        sources: list[Tensor] = []

        def given(terms: tuple[Term, ...], step: int | None) -> tuple[list[np.ndarray], np.ndarray]:
            values = [done[step]] if step is not None else [constant(term.value) for term in terms]
            sources.extend(values)
            columns = (
                [term.coefficients for term in terms] if step is None else [np.ones(point + 1)]
            )
            return [_rows(value, self.dtype) for value in values], np.stack(columns, axis=1)

        chain, at = self.region.chain, slice(point, point + 1)
        terms, columns = given(chain.terms, chain.step)
        layers = [layer.at(at, given) for layer in chain.layers]
        shape = self.last.node.shape
        tail = [static(size) for size in (shape[1:] if len(shape) == 4 else shape[-1:])]
        out = torch.empty((1, len(terms[0]), int(np.prod(tail))), dtype=self.dtype)
        native.extension().chain_outputs(
            terms,
            columns[at],
            layers,
            out.numpy(),
            activation=chain.start.activation,
            slope=chain.start.slope,
            threads=torch.get_num_threads(),
        )
        lead = sources[0].shape[: 1 if sources[0].dim() == 4 else -1]
        value = out.reshape(*lead, *tail)
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value


class NativeBackend(ReferenceBackend):
    """Runs regions in the C++ engine and everything else as the reference backend does.

    Args:
        program, dtype, device: as for `ReferenceBackend`.
        every: whether to run every region, or, but for whole segments, only those that the cost
            model says pay.

    Raises:
        CannotRun: the engine is not built, the device is not the CPU, or there is no region.
    """

    name = "native"

    def __init__(
        self, program: Program, dtype: torch.dtype, device: torch.device, every: bool = True
    ) -> None:
        super().__init__(program, dtype, device)
        if device.type != "cpu":
            raise CannotRun("native", f"it computes on the CPU, and the device is {device}")
        if not native.available():
            raise CannotRun("native", f"the C++ extension is not available: {native.reason()}")
        self._dtype = dtype
        self._whole: dict[int, Region] = {}
        self._fused: dict[int, dict[int, FusedSteps]] = {}
        reasons = []
        for segment in program.segments:
            whole = find_region(program, segment)
            if isinstance(whole, Region):
                self._whole[segment.index] = whole
            else:
                reasons.append(whole)
            regions = [whole] if isinstance(whole, Region) else find_regions(program, segment)
            taken = [r for r in regions if r.last >= 0 and (r is whole or every or r.pays(segment))]
            self._fused[segment.index] = {
                r.last: Fused(r, segment.steps[r.last], dtype) for r in taken
            }
            # A region may begin with another value than the planner's: the input of a layer that
            # has a norm behind it.
            self._kept |= {
                value for region in [*taken, *regions[:1]] for value in region.chain.shared()
            }
            if any(region.chain.images for region in taken if region is not whole):
                self._block = block_rows(
                    program, dtype, device, fewest=_ROWS_OF_A_THREAD * torch.get_num_threads()
                )
        if not self._whole and not any(self._fused.values()):
            raise CannotRun("native", reasons[0])

    def fused(self, segment: Segment) -> dict[int, FusedSteps]:
        return self._fused[segment.index]

    def sums(
        self,
        segment: Segment,
        values: Values,
        targets: Tensor,
        head: Head,
        tick: Callable[..., None],
    ) -> Tensor:
        region = self._whole.get(segment.index)
        if region is None or not head.fused or region.chain.constant:
            return super().sums(segment, values, targets, head, tick)
        chain, engine = region.chain, native.extension()

        given = given_values(values, self._dtype)
        terms, columns = given(chain.terms, None)
        sums = head.zeros(len(segment.point_indices), targets.device)
        wanted = [_SUMS[name] for name in head.names]
        together = _POINTS if chain.layers else _POINTS_OF_OUTPUTS
        for start in range(0, len(sums), together):
            points = slice(start, min(start + together, len(sums)))
            part = engine.chain_sums(
                terms,
                columns[points],
                [layer.at(points, given) for layer in chain.layers],
                targets.contiguous().numpy(),
                loss=head.loss,
                top5="top5_error" in head.names,
                activation=chain.start.activation,
                slope=chain.start.slope,
                threads=torch.get_num_threads(),
            )
            sums[points] = torch.from_numpy(part[:, wanted])
            tick(points.stop - points.start)
        return sums


def given_values(values: Values, dtype: torch.dtype) -> Given:
    """Shared values as a whole segment's chain takes them."""

    def given(terms: tuple[Term, ...], step: int | None) -> tuple[list[np.ndarray], np.ndarray]:
        return [_rows(values[term.value], dtype) for term in terms], np.stack(
            [term.coefficients for term in terms], axis=1
        )

    return given


def _rows(value: Tensor, dtype: torch.dtype) -> np.ndarray:
    """A value as the engine takes it: images, or rows of what its last axis holds."""
    value = value if value.dim() in (2, 4) else value.reshape(-1, value.shape[-1])
    array: np.ndarray = value.to(dtype).contiguous().numpy()
    return array
