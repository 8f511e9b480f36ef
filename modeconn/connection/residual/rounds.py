"""Searches for subnetworks of low loss of two residual networks, more where the bound is made."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeconn.connection.recipe import Recipe
from modeconn.connection.residual.construct import on_the_input
from modeconn.connection.residual.entries import EntryValue, entries_of
from modeconn.connection.residual.network import ResidualNetwork
from modeconn.connection.residual.subnetwork import ResidualSubnetwork
from modeconn.connection.residual.training import FoundSubnetwork, train_subnetwork
from modeconn.connection.residual.values import HalfValue, grouped, half_values, values_read
from modeconn.errors import ModeconnError
from modeconn.files.fingerprints import digest_of_tensors
from modeconn.resuming import Record, claim

Log = Callable[[str], None]
State = Mapping[str, Tensor]

# Epochs of a subnetwork of all blocks, round after round. Few: it begins with trained weights.
# Measured on a ResNet-20 of width 16: 190 steps reach the network's own loss at most entries.
ROUNDS = (1, 2, 4)
# Subnetworks of few blocks take so many times as many epochs, as far as their cost allows.
_MOST_OFTEN = 4
# Epochs of a small data set are short: the first round takes at least so many steps.
_STEPS = 150
_RECIPE = Recipe(lr=3e-3, batch_size=128, schedule="onecycle", weight_decay=1e-4)
# Later rounds begin where the one before left off.
_LATER_RATE = 2e-3
# A subnetwork is finished a little below the goal: the bound is summed in another order.
_MARGIN = 0.98


@dataclass(frozen=True, eq=False)
class ResidualProblem:
    """Two residual networks whose subnetworks are to be found.

    Attributes:
        network: the architecture.
        ends: weights of the networks "a" and "b".
        data: the training data, which can be read again. labels: of it, int64 [N].
        digest: of the data.
        goal: the loss to get to. seed: of the order of the samples.
    """

    network: ResidualNetwork
    ends: Mapping[str, State]
    data: Any
    labels: Tensor
    digest: str
    goal: float
    seed: int


class ResidualSearch:
    """Finds the subnetworks of both networks, and the one on the input, which they share.

    Args:
        problem: the networks and the goal.
        say: called with a line of text now and then.
        folder: keeps finished subnetworks, so that the same search goes on from there.
    """

    def __init__(
        self,
        problem: ResidualProblem,
        say: Log,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.problem, self.network, self.say = problem, problem.network, say
        self.entries = entries_of(problem.network)
        self.folder = None if folder is None else Path(folder)
        self.best: dict[tuple[str, str], FoundSubnetwork] = {}
        self._stop = threading.Event()
        if self.folder is not None:
            claim(self.folder, "search.json", "search", self._settings())

    def _settings(self) -> dict[str, Any]:
        """Describes all that decides the search."""
        problem = self.problem
        return {
            "networks": [digest_of_tensors(end) for end in problem.ends.values()],
            "data": problem.digest,
            "method": "residual",
            "goal": problem.goal,
            "seed": problem.seed,
        }

    def run(self, rounds: int | None = None) -> dict[str, list[FoundSubnetwork]]:
        """Searches round after round, until every subnetwork is at the goal.

        Args:
            rounds: at most so many; None for all that there are.

        Returns:
            the subnetworks of each network in the order of the entries.
        """
        for number in range(len(ROUNDS))[:rounds]:
            left = {side: self._unfinished(side) for side in self.problem.ends}
            if not any(left.values()):
                break
            self._both(left, number)
            worst = max(self.best, key=lambda key: self.best[key].loss)
            self.say(
                f"round {number + 1}: worst is {worst[1]} of {worst[0]}, "
                f"loss {self.best[worst].loss:.4g}"
            )
        shared = self._on_the_input()
        found = {}
        for side in self.problem.ends:
            own = [self.best[side, entry.label] for entry in self.entries[:-1]]
            found[side] = [*own, shared]
        return found

    def _unfinished(self, side: str) -> list[EntryValue]:
        return [entry for entry in self.entries[:-1] if not self._is_finished(side, entry)]

    def _is_finished(self, side: str, entry: EntryValue) -> bool:
        found = self.best.get((side, entry.label))
        return found is not None and found.loss <= _MARGIN * self.problem.goal

    def _on_the_input(self) -> FoundSubnetwork:
        """Makes the subnetwork on the input from the better network's stem."""
        label = self.entries[-2].label
        side = min(self.problem.ends, key=lambda name: self.best[name, label].loss)
        top = self.best[side, label]
        state = {key: value.float() for key, value in self.problem.ends[side].items()}
        made = on_the_input(self.network, state, self.entries[-1], top.subnetwork)
        return replace(top, subnetwork=made, epochs=0, seconds=0.0)

    # -- both networks at a time -------------------------------------------------------------------

    def _both(self, left: Mapping[str, list[EntryValue]], number: int) -> None:
        """Works on both networks, side by side where there are threads for both.

        Operations on few channels gain little from a second thread, two networks nearly twice.
        """
        threads = torch.get_num_threads()
        if threads < 2 or self.problem.labels.device.type != "cpu":
            for side, entries in left.items():
                self._train(side, entries, number)
            return

        def work(side: str) -> None:
            torch.set_num_threads(max(1, threads // 2))  # of this thread's operations
            try:
                self._train(side, left[side], number)
            except BaseException:
                self._stop.set()
                raise

        try:
            with ThreadPoolExecutor(len(left)) as pool:
                futures = [pool.submit(work, side) for side in left]
                try:
                    wait(futures)
                finally:
                    self._stop.set()  # an interruption reaches this thread alone
        finally:
            self._stop.clear()
            torch.set_num_threads(threads)  # the number of a thread is that of the next one, too
        raised = [future.exception() for future in futures]
        errors = [error for error in raised if error]
        # What stopped the one comes before what the other stopped for.
        for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
            raise error

    def _check(self) -> None:
        """Raises where the other network's work, or the whole search, was interrupted."""
        if self._stop.is_set():
            raise _Stopped

    def _train(self, side: str, entries: list[EntryValue], number: int) -> None:
        """Trains some subnetworks of a network, from the top down."""
        network, labels = self.network, self.problem.labels
        state = {key: value.float() for key, value in self.problem.ends[side].items()}
        last: dict[int, ResidualSubnetwork] = {}
        for group in grouped(network, entries, len(labels)):
            values: dict[HalfValue, Tensor] = {}
            for place, entry in enumerate(group):
                record = self._record(side, entry, number)
                if record.exists:
                    found = _read(record, ResidualSubnetwork(network, entry, state))
                else:
                    values = values or self._values(side, state, group[place:])
                    read = [values[key] for key in values_read(network, entry)]
                    found = self._trained(
                        side, entry, number, self._start(side, entry, state, last), read
                    )
                    _write(record, found)
                self._keep(side, entry, found)
                last[entry.side] = self.best[side, entry.label].subnetwork

    def _values(self, side: str, state: State, group: list[EntryValue]) -> dict[HalfValue, Tensor]:
        """Computes what the entries of a group read."""
        self.say(f"values of {side} at {group[0].label} to {group[-1].label}")
        wanted: list[HalfValue] = []
        for entry in group:
            wanted += values_read(self.network, entry)
        keys = list(dict.fromkeys(wanted))
        return half_values(self.network, state, self.problem.data, keys, self._check)

    def _start(
        self, side: str, entry: EntryValue, state: State, last: Mapping[int, ResidualSubnetwork]
    ) -> ResidualSubnetwork:
        """Returns what a subnetwork begins with: itself, or the one before it on its side."""
        if (side, entry.label) in self.best:
            return self.best[side, entry.label].subnetwork
        start = ResidualSubnetwork(self.network, entry, state)
        if entry.side in last:
            start.take_over(last[entry.side])
        return start

    def _trained(
        self,
        side: str,
        entry: EntryValue,
        number: int,
        start: ResidualSubnetwork,
        values: list[Tensor],
    ) -> FoundSubnetwork:
        labels, place = self.problem.labels, self.entries.index(entry)
        steps = math.ceil(len(labels) / _RECIPE.batch_size)
        often = min(_MOST_OFTEN, self.network.length // max(1, len(start.blocks)))
        epochs = ROUNDS[number] * max(1, often, math.ceil(_STEPS / steps))
        rate = _LATER_RATE if number else _RECIPE.lr
        seed = ((self.problem.seed * 31 + number) * 1009 + place) * 2 + (side == "b")
        recipe = replace(_RECIPE, epochs=epochs, lr=rate)
        with torch.enable_grad():
            found = train_subnetwork(start, values, labels, recipe, seed, self._check)
        self.say(
            f"{entry.label} of {side}: loss {found.loss:.4g}, error {100 * found.error:.3g} %, "
            f"{epochs} epochs, {found.seconds:.0f} s"
        )
        return found

    def _keep(self, side: str, entry: EntryValue, found: FoundSubnetwork) -> None:
        """Keeps a result where it is the best of its entry, and adds up the work in any case."""
        if not math.isfinite(found.loss):
            raise ModeconnError(
                f"the subnetwork of {entry.label} of {side} has a loss that is not finite: "
                "look for weights or inputs that are too large"
            )
        before = self.best.get((side, entry.label))
        epochs = found.epochs + (before.epochs if before else 0)
        seconds = found.seconds + (before.seconds if before else 0.0)
        better = found if before is None or found.loss < before.loss else before
        self.best[side, entry.label] = replace(better, epochs=epochs, seconds=seconds)

    def _record(self, side: str, entry: EntryValue, number: int) -> Record:
        name = f"round-{number}-{side}-{entry.label}.safetensors"
        file = None if self.folder is None else self.folder / name
        return Record(file, "finished subnetwork", {})


class _Stopped(Exception):
    """Ends the work on one network where that on the other has ended."""


def _write(record: Record, found: FoundSubnetwork) -> None:
    tensors = {key: value.contiguous() for key, value in found.subnetwork.state_dict().items()}
    numbers = [found.loss, found.error, found.epochs, found.seconds]
    record.write(tensors, {"numbers": [repr(number) for number in numbers]})


def _read(record: Record, like: ResidualSubnetwork) -> FoundSubnetwork:
    tensors, state = record.read()
    try:
        like.load_state_dict(tensors)
        loss, error, epochs, seconds = map(float, state["numbers"])
    except (RuntimeError, KeyError, ValueError, TypeError) as error_:
        raise ModeconnError(
            f"{record.file} is no finished subnetwork: remove it to do it again ({error_})"
        ) from error_
    return FoundSubnetwork(like.eval(), loss, error, int(epochs), seconds)
