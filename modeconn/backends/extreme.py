"""Batches with values so large that sums of them overflow run by a plan without shortcuts.

W(t) x = (1 - t) W_0 x + t W_1 x holds for numbers, not for infinities: where W_0 x overflows and
W(t) x does not, or where x is infinite, the right side may be NaN. An input that is not finite
reaches units that nothing reads, too, and 0 · ∞ is NaN. So values that are to be combined, and
inputs, are looked at once for a batch, and a batch that has a larger one than the square root of
the largest number goes through the reference backend by a plan in which every value is computed
whole at every point. A first layer's values, the largest of all to read, are only looked at where
the inputs and the sum of its weights allow them to be so large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modeconn.backends.base import Backend, Request, Tick, Values
from modeconn.backends.reference import ReferenceBackend
from modeconn.capture.graph import Entry, In, Node
from modeconn.data.inputs import Inputs
from modeconn.metrics import Head
from modeconn.plan.program import Combination, Form, Program, Segment, needed

# Operations of which no output is larger than the largest input times the sum of all weights, plus
# that of the biases; and such as move numbers to other places.
_WEIGHTED = frozenset({"linear", "conv1d", "conv2d"})
_MOVED = frozenset({"flatten", "view", "reshape"})


class _Plain(dict[int, Any]):
    """Shared values of the plan without shortcuts."""


class Careful:
    """A backend for all batches but those with extreme values.

    Args:
        backend: for the others.
        request: what it was made for.
    """

    def __init__(self, backend: Backend, request: Request) -> None:
        self._backend, self._request = backend, request
        self._limit = float(torch.finfo(request.dtype).max) ** 0.5
        self._combined = combined(request.program)
        self._gains = _gains(request.program, self._combined)
        self._plain: ReferenceBackend | None = None

    @property
    def name(self) -> str:
        """The name of the backend for ordinary values."""
        return self._backend.name

    def most_rows(self, budget: int) -> int:
        """Rows to take at a time, so that the shared values kept for them fit a budget of bytes."""
        return self._backend.most_rows(budget)

    def shared(self, x: Inputs) -> Values:
        """The shared values of a batch that the segments read."""
        inputs = self._request.program.graph.given(x)
        values: Values = {}
        largest = max(map(_largest, inputs), default=0.0)
        if largest <= self._limit:
            values = self._backend.shared(x)
            looked_at = {i for i in self._combined if not self._is_small(i, largest)}
            if all(_largest(values[i]) <= self._limit for i in looked_at & set(values)):
                return values
        return _Plain(self._by_plain_plan().shared(x))

    def sums(
        self, segment: Segment, values: Values, targets: Tensor, head: Head, tick: Tick
    ) -> Tensor:
        """The head's sums over a batch at each of the segment's points, float64 [T, metrics]."""
        if not isinstance(values, _Plain):
            return self._backend.sums(segment, values, targets, head, tick)
        return self._by_plain_plan().sums(self._like(segment), values, targets, head, tick)

    def all_outputs(
        self, segment: Segment, values: Values, rows: int
    ) -> Iterator[tuple[int, slice, Any]]:
        """The network's output: (point, block of rows, output); blocks of a point come in order."""
        if not isinstance(values, _Plain):
            return self._backend.all_outputs(segment, values, rows)
        return self._by_plain_plan().all_outputs(self._like(segment), values, rows)

    def _is_small(self, number: int, largest: float) -> bool:
        """Whether a value is known to be ordinary from the largest number of the inputs."""
        return number in self._gains and self._gains[number] * max(largest, 1.0) <= self._limit

    def _by_plain_plan(self) -> ReferenceBackend:
        if self._plain is None:
            plain = self._request.program.plain
            assert plain is not None
            self._plain = ReferenceBackend(plain(), self._request.dtype, self._request.device)
        return self._plain

    def _like(self, segment: Segment) -> Segment:
        """The plain plan's segment for the same points."""
        place = self._request.program.segments.index(segment)
        return self._by_plain_plan().program.segments[place]


def combined(program: Program) -> set[int]:
    """The shared values that are added up with coefficients."""
    forms: list[Form | int | None] = []
    for segment in program.segments:
        forms += segment.outputs.values()
        for step in segment.steps:
            forms += [*step.inputs, step.combine]
    found: set[int] = set()
    for form in forms:
        if isinstance(form, Combination) and not form.constant:
            found.update(term.value for term in form.terms)
    return found


def _gains(program: Program, wanted: set[int]) -> dict[int, float]:
    """Factors by which values exceed the largest number of the inputs, or 1, at the most.

    Those of values that linear operations make of the inputs and that lead to some wanted ones.
    """
    gains: dict[int, float] = {}
    for number in sorted(needed(program.shared, wanted)):
        step = program.shared[number]
        if step.node.op == "input":
            gains[number] = 1.0
        elif _is_bounded(step.node) and step.inputs[0] in gains:
            weights = sum(float(entry.abs().sum(dtype=torch.float64)) for entry in step.entries)
            gains[number] = gains[step.inputs[0]] * max(weights, 1.0)
    return gains


def _is_bounded(node: Node) -> bool:
    """Whether a value is bounded by its only input and the entries that multiply or shift it."""
    if len(node.inputs) != 1:  # such as a view of a parameter, which has none
        return False
    if node.op in _MOVED:
        return True
    return (
        node.op in _WEIGHTED
        and node["input"] == In(0)
        and isinstance(node["weight"], Entry)
        and not isinstance(node["bias"], In)
    )


def _largest(value: Any) -> float:
    """The largest magnitude among a value's numbers; infinite where one is NaN."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return 0.0
    # NaN shows in the extremes.
    extremes = [abs(float(extreme)) for extreme in value.detach().aminmax()]
    return math.inf if any(map(math.isnan, extremes)) else max(extremes)
