"""Progress of an evaluation, shown as a bar or given to a callable."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from modeconn.data.batches import Batches

# Called with (samples done, samples in all); the second is None where the data does not say.
Progress = Callable[[int, "int | None"], None]


@contextlib.contextmanager
def reporting(
    progress: bool | Progress | None, unit: str = "samples", what: str = "evaluate"
) -> Iterator[Progress]:
    """Yield the callable that receives the progress.

    Args:
        progress: a callable, used as it is; True for a bar, False for none, None for a bar where
            stderr is a terminal.
        unit: of what is done.
        what: the work, for the bar.
    """
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not _on_terminal()):
        yield lambda done, total: None
        return
    from tqdm import tqdm

    # A bar that is gone within half a second would only flicker.
    with tqdm(unit=f" {unit}", unit_scale=True, leave=False, delay=0.5, desc=what) as bar:

        def report(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


def told(say: Callable[[str], None], what: str, seconds: float = 10.0) -> Progress:
    """Returns a callable that tells of progress by a line of text now and then.

    Args:
        say: is called with the line. what: the work.
        seconds: between two lines.
    """
    began = last = time.monotonic()
    first: int | None = None

    def report(done: int, total: int | None) -> None:
        nonlocal last, first
        now = time.monotonic()
        first = done if first is None else first  # what an earlier call did takes no time
        if now - last < seconds or done == total:
            return
        last = now
        if total is None or done == first:
            say(f"{what}: {done:,} samples")
            return
        left = (now - began) / (done - first) * (total - done)
        say(f"{what}: {done:,} of {total:,} samples, {left:.0f} s left")

    return report


def _on_terminal() -> bool:
    """Whether stderr is a terminal; a process may have none, or have closed it."""
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()


class Meter:
    """Reports the samples of an evaluation, and of the pass that recomputes statistics before it.

    A sample counts alike in both passes.

    Args:
        report: called with (samples done, samples in all).
        evaluated: the data sets of the evaluation.
        training: the data that statistics are recomputed from, if any.
        limit: the most batches of `training` that are read.
    """

    def __init__(
        self,
        report: Progress,
        evaluated: Sequence[Batches],
        training: Batches | None = None,
        limit: int | None = None,
    ) -> None:
        self._report, self._evaluated = report, evaluated
        self._training, self._limit = training, limit
        self._recomputed = self._before = 0

    def recomputed(self, rows: int) -> None:
        """Report that some rows of the first of two passes are done."""
        self._recomputed += rows
        self._report(self._recomputed, self._expected())

    def part(self, rows: int, points: int) -> Callable[..., None]:
        """Begin a part of the evaluation.

        Args:
            rows: samples of the part.
            points: points of the path that it is evaluated at.

        Returns:
            A callable for points that are done, one by default. They count as a share of the rows.
        """
        before, done = self._before, 0
        self._before += rows

        def tick(more: int = 1) -> None:
            nonlocal done
            done += more
            self._evaluated_rows(before + rows * done // points)

        return tick

    def skip(self, rows: int) -> None:
        """Report a part of the evaluation that was done by an earlier call."""
        self._before += rows
        self._evaluated_rows(self._before)

    def _evaluated_rows(self, done: int) -> None:
        total = self._total()
        self._report(self._recomputed + done, None if total is None else self._recomputed + total)

    def _expected(self) -> int | None:
        """Samples of both passes, as far as the data says."""
        evaluated = self._total()
        training = None if self._training is None else self._training.samples
        if evaluated is None or training is None or self._training is None:
            return None
        if self._limit is not None:
            training = min(training, self._limit * self._training.batch_size)
        return evaluated + training

    def _total(self) -> int | None:
        """Samples of the evaluated data sets, if all of them say."""
        counts = [data.samples for data in self._evaluated]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None
