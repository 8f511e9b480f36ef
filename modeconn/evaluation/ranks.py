"""Processes that share an evaluation: each computes some batches, and all add them up alike.

Batch b is computed by rank b modulo their number. A batch's sums do not depend on who computes
them, and every rank adds all of them up in the order of the batches: results are equal, bit for
bit, on any number of ranks and on each of them.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from modeconn.errors import ModeconnError, first_line

# Batches that each rank computes between two exchanges: a failure is known to all after so many,
# and a rank that is late once makes up for it within them.
_ROUND = 8
# Seconds that all ranks have to begin: one may read its data from a slow disk.
_TO_BEGIN = 300

# What a rank tells the others; the answer has the message of every rank, in their order.
Exchange = Callable[[Any], "list[Any]"]


def installed() -> str:
    """Return the versions of what computes."""
    import torch

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return f"modeconn {importlib.metadata.version('modeconn')}, torch {torch.__version__}"
    return f"torch {torch.__version__}"


class _Failure:
    """In place of a message: a rank has failed."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Elsewhere(ModeconnError):
    """Another rank has failed."""


class Ranks:
    """This process among those that share an evaluation; alone by default.

    Args:
        rank: its place among them.
        size: how many there are.
        exchange: gives each rank's message to all; every rank calls it equally often.

    Attributes:
        shared: whether there is a group, of one process even: its batches are those of any number.
    """

    def __init__(self, rank: int = 0, size: int = 1, exchange: Exchange | None = None) -> None:
        self.rank, self.size, self.shared = rank, size, exchange is not None
        self._exchange: Exchange = exchange or (lambda message: [message])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Within, what fails on one rank fails on all.

        Raises:
            ModeconnError: another rank has failed; the text says which, and why.
        """
        try:
            yield
        except _Elsewhere:
            raise
        except Exception as error:
            with contextlib.suppress(_Elsewhere):
                self.exchange(_Failure(first_line(error)))
            raise
        self.exchange("done")

    def exchange(self, message: Any) -> list[Any]:
        """Return every rank's message, in their order.

        Raises:
            ModeconnError: another rank has failed, or is gone.
        """
        try:
            found = self._exchange(message)
        except RuntimeError as error:  # a connection that was closed, or has timed out
            raise _Elsewhere(
                f"a rank other than {self.rank} is gone ({first_line(error)}): its own output says "
                "why; expected all ranks to run to the end"
            ) from error
        for rank, each in enumerate(found):
            if isinstance(each, _Failure) and rank != self.rank:
                raise _Elsewhere(f"rank {rank} of {self.size}: {each.text}")
        return found

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Check that all ranks compute the same.

        Args:
            facts: plain values or digests, by what they are of.

        Raises:
            ModeconnError: they differ; the text says in what, and on which rank.
        """
        if not self.shared:
            return
        found = self.exchange(dict(facts))
        for rank, theirs in enumerate(found):
            names = [name for name in facts if theirs.get(name) != found[0].get(name)]
            if names:
                raise ModeconnError(
                    f"ranks 0 and {rank} differ in {' and '.join(names)}: expected the same "
                    "arguments on every rank"
                )

    def owns(self, number: int) -> bool:
        """Whether a batch is this rank's."""
        return number % self.size == self.rank

    def in_order(self, own: Iterator[tuple[int, Any]]) -> Iterator[list[Any]]:
        """Yield what all ranks computed of their batches, in the order of the batches.

        Args:
            own: this rank's batches, each a number and what was computed.

        Yields:
            the batches of a round.
        """
        more = True
        while more:
            mine = list(itertools.islice(own, _ROUND))
            found = self.exchange((mine, len(mine) == _ROUND))
            more = any(going_on for _, going_on in found)
            together = itertools.chain.from_iterable(batches for batches, _ in found)
            yield [value for _, value in sorted(together, key=lambda pair: pair[0])]


_HERE: ContextVar[Ranks | None] = ContextVar("ranks", default=None)


@contextlib.contextmanager
def acting_as(ranks: Ranks) -> Iterator[None]:
    """Within, evaluations are shared by these ranks, whatever torch.distributed says: for tests."""
    before = _HERE.set(ranks)
    try:
        yield
    finally:
        _HERE.reset(before)


def present_ranks(distributed: bool) -> Ranks:
    """Return the processes that share an evaluation here.

    Args:
        distributed: whether those of torch.distributed's default group do, if there is one.

    Raises:
        ModeconnError: some of them do not begin.
    """
    given = _HERE.get()
    if given is not None and distributed:
        return given
    import torch.distributed as dist

    if not distributed or not dist.is_available() or not dist.is_initialized():
        return Ranks()
    size = dist.get_world_size()
    if dist.get_backend() == "gloo" and size > 1:
        wait = datetime.timedelta(seconds=_TO_BEGIN)
        try:
            dist.monitored_barrier(timeout=wait)
        except RuntimeError as error:
            raise ModeconnError(
                f"the {size} ranks of torch.distributed do not all evaluate ({first_line(error)}): "
                "expected each to call it, or distributed=False"
            ) from error

    def exchange(message: Any) -> list[Any]:
        found: list[Any] = [None] * size
        dist.all_gather_object(found, message)
        return found

    return Ranks(dist.get_rank(), size, exchange)
