"""Interface of a backend: what it is asked to run, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from modeconn.data.inputs import Inputs
from modeconn.errors import Unsupported
from modeconn.metrics import Head
from modeconn.plan.program import Program, Segment

# The shared values of one batch, by number.
Values = dict[int, Any]
# Called after some points are done, with their number (1 by default).
Tick = Callable[..., None]


@dataclass(frozen=True)
class Request:
    """A program, and how a backend is asked to run it.

    Attributes:
        program: what to run.
        dtype, device: of the computation.
        precision: of products: "float32", "float64", "tf32" or "bf16".
        gradients: whether outputs are differentiated, and weights may change between batches.
        named: whether the user asked for this backend, which then runs all that it can; otherwise
            it takes only what its cost model says pays.
    """

    program: Program
    dtype: torch.dtype
    device: torch.device
    precision: str = "float32"
    gradients: bool = False
    named: bool = True


class Backend(Protocol):
    """Runs a program on batches of rows, for all points of its segments."""

    @property
    def name(self) -> str:
        """The backend's name, as results state it."""

    @classmethod
    def supports(cls, request: Request) -> None:
        """Checks device, dtype and installation, without a look at the program's steps.

        Raises:
            Unsupported: the backend does not run there; the text says why.
        """

    @classmethod
    def create(cls, request: Request) -> Backend:
        """Makes the backend for a request that `supports` has let pass.

        Raises:
            Unsupported: there is nothing in the program that the backend runs.
        """

    def most_rows(self, budget: int) -> int:
        """Rows to take at a time, so that the shared values kept for them fit a budget of bytes."""

    def shared(self, x: Inputs) -> Values:
        """The shared values of a batch that the segments read."""

    def sums(
        self, segment: Segment, values: Values, targets: Tensor, head: Head, tick: Tick
    ) -> Tensor:
        """The head's sums over a batch at each of the segment's points, float64 [T, metrics].

        Args:
            values: what `shared` returned for the batch.
            targets: as `head.fit` returned them.
            tick: called as points are done, with their number.
        """

    def all_outputs(
        self, segment: Segment, values: Values, rows: int
    ) -> Iterator[tuple[int, slice, Any]]:
        """The network's output: (point, block of rows, output); blocks of a point come in order."""


@dataclass(frozen=True)
class Sums:
    """Losses and metrics that a kernel sums itself, without outputs for the head.

    Attributes:
        losses: by the names that `evaluate` has for them.
        columns: of what the kernel returns, by the metrics' names.
    """

    losses: tuple[str, ...]
    columns: dict[str, int]

    def cover(self, head: Head) -> bool:
        """Whether the kernel sums everything that is requested."""
        return head.requests_only(self.losses, self.columns) and not head.leaves_out

    def of(self, head: Head) -> list[int]:
        """The columns of the requested metrics, in the head's order."""
        return [self.columns[name] for name in head.names]


Made = TypeVar("Made")


def attempt(make: Callable[[], Made]) -> Made | Unsupported:
    """The result of `make`, or the reason why it has none."""
    try:
        return make()
    except Unsupported as reason:
        return reason
