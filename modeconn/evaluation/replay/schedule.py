"""Decides which points of a scan run as they are, and makes answers for the others.

The first points run as they are, and are recorded. Calls that repeat, with the same inputs and
nothing drawn or changed, can be answered at later points, from a planned pass for a chunk of them.
A chunk begins with a point that ran: its planned output must be what the model returned there.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from modeconn.capture.opaque import line_of
from modeconn.data.inputs import Inputs
from modeconn.data.randomness import untouched_randomness
from modeconn.errors import ModeconnError, Unsupported
from modeconn.evaluation.replay.calls import Call, agree
from modeconn.evaluation.replay.passes import Passes
from modeconn.evaluation.replay.stand_in import Answers

# Points that run before the scan gives up looking for calls that repeat: the first may warm up.
_WATCHED = 3
# Seconds that the other points' forwards must take for a capture to pay (it takes about 1.4 s; the
# first of a process loads torch.export as well), and for passes of a network that is captured, or
# that needs no torch.export.
COLD, LOADED, WARM = 5.0, 2.0, 0.1
# Points of the first chunk: enough to see whether planned passes are faster.
_PROBE = 16
# The most that planned passes may take of the forwards' time, or the rest runs as it is.
_GAIN = 0.9


def worth(seconds: float, passes: Passes, batches: Sequence[Inputs]) -> str:
    """Return why planning some forwards does not pay; "" if it does.

    Args:
        seconds: that the forwards take as they are.
        passes: that would run instead.
        batches: the inputs of the forwards.
    """
    if seconds < WARM:
        return "the forwards take less time than planning them"
    if seconds >= (LOADED if "torch._dynamo" in sys.modules else COLD):
        return ""
    with contextlib.suppress(ModeconnError, Unsupported), untouched_randomness():
        if all(map(passes.is_at_hand, batches)):
            return ""
    return "the forwards take less time than a capture of the model"


@dataclass
class Chunk:
    """Answers for points in a row.

    Attributes:
        first, stop: the points.
        calls: by number, with the outputs at the chunk's points as a structure of [T, B, …].
    """

    first: int
    stop: int
    calls: dict[int, tuple[Call, Any]] = field(default_factory=dict)

    def answers(self, point: int) -> Answers:
        """Return the answers at one of the points."""

        def answer(number: int) -> tuple[Call, Any] | None:
            if number not in self.calls:
                return None
            call, table = self.calls[number]
            row = point - self.first
            # a copy: the function may change it, and it keeps no table alive
            return call, pytree.tree_map_only(Tensor, lambda tensor: tensor[row].clone(), table)

        return answer


class Schedule:
    """Lists what happens at each point of a scan, in order.

    Args:
        passes: run the planned passes.
        t: the points, [T] or [T, dim].
        replay: True to plan wherever calls repeat, False never to; None where that pays.
        budget: bytes for the answers of a chunk.

    Attributes:
        reason: why forwards run as they are, in the latest words; "" while all is well.
        points: how many there are.
        captured: whether a planned pass ran.
    """

    def __init__(self, passes: Passes, t: np.ndarray, replay: bool | None, budget: int) -> None:
        self._passes, self._t, self._budget = passes, t, budget
        self.points = len(t)
        self._forced = replay is True
        self._before: list[Call | None] = []
        self._chunk: Chunk | None = None
        self._watched = self._missed = 0
        self._over = replay is False or len(t) <= 2
        self.captured = False
        self.reason = "replay is False" if replay is False else ""
        if not self.reason and self._over:
            self.reason = "there are two points at most"

    def answers(self, point: int) -> Answers | None:
        """Return the answers to the calls at a point; None where it runs as it is."""
        chunk = self._chunk
        return None if chunk is None or point >= chunk.stop else chunk.answers(point)

    def records(self, point: int) -> bool:
        """Whether calls are to be recorded at a point."""
        return not self._over and self.answers(point) is None

    def done(self, point: int, calls: list[Call | None], answered: int) -> None:
        """Take notice of a point.

        Args:
            point: its place.
            calls: what was recorded, if anything was.
            answered: how many forwards were answered there.
        """
        if self._over:
            return
        if self._chunk is not None and point < self._chunk.stop:
            self._missed = 0 if answered else self._missed + 1
            gradients = any(call.differentiated for call, _ in self._chunk.calls.values())
            if self._missed == 2 or gradients:
                text = "gradients are taken" if gradients else "inputs, weights or modes change"
                self._end(f"{text} from point to point")
            return
        self._watched += 1
        repeated, self._before = self._repeated(calls), calls
        if repeated and self._pays(repeated, len(self._t) - point - 1):
            self._plan(point, repeated)
        elif self._watched >= _WATCHED:
            self._end(self.reason or "no call of the model repeats from point to point")

    def _repeated(self, calls: list[Call | None]) -> dict[int, Call]:
        """The calls that were the same at the point before, by number, with the lesser time."""
        repeated = {}
        for number, (before, now) in enumerate(zip(self._before, calls)):
            if before is not None and now is not None and now.repeats(before):
                now.seconds = min(now.seconds, before.seconds)
                repeated[number] = now
        return repeated

    def _pays(self, repeated: dict[int, Call], left: int) -> bool:
        """Whether the forwards of the points that are left take longer than planning."""
        if not left:
            return False
        if self._forced or self.captured:
            return True
        seconds = left * sum(call.seconds for call in repeated.values())
        self.reason = worth(seconds, self._passes, [call.inputs for call in repeated.values()])
        return not self.reason

    def _plan(self, point: int, repeated: dict[int, Call]) -> None:
        """Make answers for the points that follow, if those at this point are right."""
        size = sum(call.bytes_of_output for call in repeated.values())
        most = max(2, self._budget // max(size, 1))
        count = min(most if self.captured else min(_PROBE, most), len(self._t) - point)
        chunk = Chunk(point, point + count)
        inputs = [call.inputs for call in repeated.values()]
        before = self._passes.seconds
        try:
            with untouched_randomness():
                tables = self._passes.outputs(self._t[point : chunk.stop], inputs)
        except (Unsupported, ModeconnError, RuntimeError) as error:
            self._end(line_of(error) if isinstance(error, RuntimeError) else str(error))
            return
        for (number, call), table in zip(repeated.items(), tables):
            first = pytree.tree_map_only(Tensor, lambda tensor: tensor[0], table)
            if agree(first, call.output):
                chunk.calls[number] = (call, table)
        if not chunk.calls:
            self._end(
                "the model does not return what it returns in evaluation mode with the weights of "
                "the point, row by row"
            )
            return
        self.captured, self.reason, self._watched = True, "", 0
        seconds = self._passes.seconds - before
        true = sum(call.seconds for call in repeated.values()) * count
        if seconds > _GAIN * true and not self._forced:
            self._end("planned passes take as long as the forwards")
        self._chunk = chunk

    def _end(self, reason: str) -> None:
        self._over, self._chunk, self._before, self.reason = True, None, [], reason
