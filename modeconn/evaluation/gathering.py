"""Outputs of all samples at all points, for metrics that see them together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.backends.base import Backend, Tick, Values
from modeconn.errors import ModeconnError
from modeconn.evaluation.collecting import by_leaf
from modeconn.files.memory import main_memory
from modeconn.metrics import Head
from modeconn.metrics.head import logits_of
from modeconn.plan.program import Program, Segment


class Gathering:
    """Sums of a head as a backend's, whose outputs are kept on the way.

    Args:
        engine: runs the program.
        program: a plan for the points.
        head: has metrics of the whole data set.
        samples: of the data, where that is known.
    """

    def __init__(self, engine: Backend, program: Program, head: Head, samples: int | None) -> None:
        self._engine, self._program, self._head, self._samples = engine, program, head, samples
        self._outputs: list[list[Any]] = [[] for _ in program.points]
        self._targets: list[Tensor] = []

    def sums(
        self, segment: Segment, values: Values, targets: Tensor, head: Head, tick: Tick
    ) -> Tensor:
        """Return the head's sums over a batch at each point, as `Backend.sums` does.

        Raises:
            ModeconnError: the network returns what cannot be joined, or more than there is memory.
        """
        sums = head.zeros(len(segment.point_indices), targets.device)
        if segment is self._program.segments[0]:
            self._targets.append(targets.cpu())
        for point, block, output in self._engine.all_outputs(segment, values, len(targets)):
            if head.names:
                sums[point] += head.sums(output, targets[block])
            kept = self._outputs[segment.point_indices[point]]
            kept.append(self._kept(output, block.stop - block.start))
            if block.stop == len(targets):
                tick()
        return sums

    def values(self) -> dict[str, np.ndarray]:
        """Return the metrics at the program's points, float64 [T], by name."""
        found: dict[str, list[float]] = {name: [] for name in self._head.whole}
        for blocks in self._outputs:
            for name, metric in self._head.whole.items():
                # anew for each: a function may write into what it is given
                outputs, targets = by_leaf(torch.cat, blocks), torch.cat(self._targets)
                found[name].append(metric.value(outputs, targets))
        return {name: np.array(column) for name, column in found.items()}

    def _kept(self, output: Any, count: int) -> Any:
        """Copy the output for a block of rows to main memory."""
        output = logits_of(output)
        tensors = pytree.tree_leaves(output)
        for tensor in tensors:
            if not isinstance(tensor, Tensor) or not tensor.dim() or len(tensor) != count:
                raise self._cannot_join(tensor)
        if not self._targets[1:] and self._samples:
            self._check_memory(sum(tensor[:1].nbytes for tensor in tensors) * self._samples)
        return pytree.tree_map(lambda tensor: tensor.detach().to("cpu", copy=True), output)

    def _cannot_join(self, part: Any) -> ModeconnError:
        shape = f" {list(part.shape)}" if isinstance(part, Tensor) else ""
        return ModeconnError(
            f"the model returns a {type(part).__name__}{shape}, and metric {self._name!r} needs a "
            "row per sample, [N, …], to join the outputs of all: wrap the model in a module that "
            "returns the tensor you want"
        )

    def _check_memory(self, of_a_point: int) -> None:
        needed, there = of_a_point * len(self._program.points), main_memory()
        if there and needed > there:
            raise ModeconnError(
                f"metric {self._name!r} needs the outputs of {self._samples:,} samples at "
                f"{len(self._program.points):,} points, {needed / 2**30:,.1f} GiB, and the machine "
                f"has {there / 2**30:,.1f}: expected fewer points a call, or a model that returns "
                "less"
            )

    @property
    def _name(self) -> str:
        return next(iter(self._head.whole))
