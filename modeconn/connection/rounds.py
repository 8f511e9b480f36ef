"""Searches for subnetworks of low loss, from cheap to dear: more is spent where the bound is made.

Two kinds of subnetworks are trained. *Shallow* ones (methods "readout" and "head") have at most a
few hidden layers on fixed features, so an epoch is a small matrix problem; identity layers carry
their logits to the output. *Full-depth* ones (method "trained") have every layer of the network.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeconn.connection.features import Features
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.positions import fits_below
from modeconn.connection.readout import fit_readout
from modeconn.connection.recipe import Recipe
from modeconn.connection.resume import Fits, search_settings
from modeconn.connection.subnetworks import Subnetwork, initial, why_not_carried
from modeconn.connection.targets import Targets
from modeconn.connection.trained_subnetwork import BestSubnetwork, TrainedSubnetwork
from modeconn.connection.training import measure, train_subnetworks
from modeconn.connection.warm_start import first_layer_of, input_subnetwork
from modeconn.errors import ModeconnError

# How subnetworks are searched for. "auto" is "head" after readouts, or "trained".
METHODS = ("auto", "readout", "head", "trained")
# A subnetwork stops a little below the target: the bound is taken in another order of summation.
_MARGIN = 0.95
# Hidden layers and epochs of shallow subnetworks, round after round. Measured on two 10 × 245 MNIST
# networks, half of the units kept: at entry layer 1, two hidden layers reach 0.001 in 20 epochs,
# three 0.0008 in 16.
_SHALLOW_ROUNDS = ((2, 20), (3, 30), (3, 60))
# Iterations of L-BFGS for a readout, round after round: a readout begins where the round before
# left off, so each round goes on rather than starting over.
_READOUT_ROUNDS = (300, 1000, 3000)
# Rows and steps that tell whether a readout is worth a try. On two 10 × 245 MNIST networks, target
# 0.001, those that pass take 16 to 63 steps on all rows; others take 250 or never get there.
_TRIAL_ROWS, _TRIAL_STEPS = 10_000, 30
# Epochs of full-depth subnetworks, round after round. Few: they begin with trained weights.
_FULL_DEPTH_ROUNDS = (6, 12, 24)
_ROUNDS = {
    "auto": len(_SHALLOW_ROUNDS),
    "head": len(_SHALLOW_ROUNDS),
    "readout": len(_READOUT_ROUNDS),
    "trained": len(_FULL_DEPTH_ROUNDS),
}
# Small matrix problems bear a larger learning rate and batch than full-depth training.
_SHALLOW = Recipe(lr=4e-3, batch_size=256, schedule="onecycle", weight_decay=1e-4)
_FULL_DEPTH = Recipe(lr=1e-3, batch_size=128, schedule="onecycle", weight_decay=1e-4)
# Epochs of a small data set are short: the first round takes at least so many steps, and the others
# more in proportion.
_STEPS = 2000


# The name of a network and an entry layer of it. The subnetwork on the input belongs to all
# networks and has the slot of the first one.
Slot = tuple[str, int]
# Subnetworks to begin with, by slot.
Starts = Sequence[tuple[Slot, Subnetwork]]


@dataclass(frozen=True, eq=False)
class SearchProblem:
    """Networks whose subnetworks are to be found, and how low their losses should be.

    Attributes:
        chain: the architecture of all.
        ends: the weights of the networks by name.
        features: their kept features h_l[I_l] on the training data.
        units: I_l by entry layer.
        targets: of the training data, with their loss.
        goal: the loss to get to.
        seed: of the initial weights and the order of the samples.
    """

    chain: LayerChain
    ends: Mapping[str, Mapping[str, Tensor]]
    features: Mapping[str, Features]
    units: Mapping[int, Tensor]
    targets: Targets
    goal: float
    seed: int


class Search:
    """Finds a subnetwork for every entry layer of all networks; that of entry layer 0 is shared.

    S_0 is the first layer of the network whose S_1 is best, then that S_1, where there is room for
    both side by side; it costs nothing. Elsewhere it is trained.

    Args:
        problem: the networks and the goal.
        method: one of `METHODS`.
        say: called with a line of text now and then.
        folder: keeps the finished fits and the unfinished one, so that the same search goes on from
            there.

    Raises:
        ModeconnError: shallow subnetworks are asked of a network that cannot carry their logits; a
            folder of another search.
    """

    def __init__(
        self,
        problem: SearchProblem,
        method: str,
        say: Callable[[str], None],
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.problem, self.chain, self.units = problem, problem.chain, problem.units
        self.method, self.say = _resolved(method, problem.chain), say
        self.kind = "head" if self.method == "auto" else self.method
        self.best: dict[Slot, BestSubnetwork] = {}
        self.shared: Slot = (next(iter(problem.ends)), 0)
        self._for_nothing = False  # whether the shared subnetwork is made of an S_1
        settings: dict[str, Any] = {}
        if folder is not None:
            settings = search_settings(
                problem.ends,
                problem.features,
                problem.units,
                method=self.method,
                goal=problem.goal,
                seed=problem.seed,
                loss=problem.targets.name,
            )
        self.fits = Fits(folder, settings)

    def run(self, rounds: int | None = None) -> dict[str, list[BestSubnetwork]]:
        """Searches round after round, until every entry layer is at the goal.

        Args:
            rounds: at most so many; None for all that there are.

        Returns:
            the subnetworks of entry layers 0 … L-1 of each network.
        """
        for number in range(_ROUNDS[self.method])[:rounds]:
            left = [slot for slot in self._slots() if not self._is_finished(slot)]
            if not left and self._is_finished(self.shared):
                break
            if self.method == "auto" and number == 0:
                left = self._without_readouts(left)
            self._train(left, number)
            if not self._take_shared() and not self._is_finished(self.shared):
                self._train([self.shared], number)
            self._report(number)
        shared = self.best[self.shared]
        return {side: [shared, *self._found_above(side)] for side in self.problem.ends}

    def _slots(self) -> list[Slot]:
        """Lists slots above the input from the top down: each can begin with what is above it."""
        slots = []
        for entry in reversed(range(1, self.chain.length)):
            slots += [(side, entry) for side in self.problem.ends]
        return slots

    def _train(self, left: Sequence[Slot], number: int) -> None:
        if self.method == "trained":
            self._train_full_depth(left, number)
        else:
            self._train_shallow(left, number)

    def _take_shared(self) -> bool:
        """Takes S_0 for nothing from the best S_1; returns whether there is room for it."""
        side = min(self.problem.ends, key=lambda name: self.best[name, 1].loss)
        found = input_subnetwork(self.chain, self.problem.ends[side], self.best[side, 1].subnetwork)
        subnetworks = [self.best[name, 1].subnetwork for name in self.problem.ends]
        if found is None or not fits_below(self.chain, found, subnetworks):
            if self._for_nothing:  # it was, beside narrower S_1
                del self.best[self.shared]
                self._for_nothing = False
            return False
        h = self.problem.features[side].entry(0)
        loss, error = measure(self.chain, found, h, self.problem.targets)
        if self._for_nothing or self.shared not in self.best or loss < self.best[self.shared].loss:
            method, self._for_nothing = self.best[side, 1].method, True
            self.best[self.shared] = BestSubnetwork(found, loss, error, method, 0, 0.0)
        return True

    def _is_finished(self, slot: Slot) -> bool:
        return slot in self.best and not self.best[slot].loss > self.problem.goal

    def _found_above(self, side: str) -> list[BestSubnetwork]:
        """Lists a network's own subnetworks, those of entry layers 1 … L-1."""
        return [self.best[side, entry] for entry in range(1, self.chain.length)]

    def _report(self, number: int) -> None:
        worst = max(self.best, key=lambda slot: self.best[slot].loss)
        side, entry = worst
        self.say(
            f"round {number + 1}: worst is entry layer {entry} of {side}, "
            f"loss {self.best[worst].loss:.4g}"
        )

    # -- shallow subnetworks on fixed features -----------------------------------------------------

    def _train_shallow(self, left: Sequence[Slot], number: int) -> None:
        """Trains shallow subnetworks; those of equal shape together, whatever their slots."""
        depth, epochs = (0, 0) if self.method == "readout" else _SHALLOW_ROUNDS[number]
        groups: dict[tuple[int, ...], list[tuple[Slot, Subnetwork]]] = {}
        for slot in left:
            sub = self._new_shallow(slot, depth, number)
            groups.setdefault((len(sub.kept), *sub.widths), []).append((slot, sub))
        for members in groups.values():
            entries = ", ".join(f"{side}{entry}" for (side, entry), _ in members)
            widths = members[0][1].widths
            if not widths:
                self.say(f"round {number + 1}: readouts at {entries}")
                self._fit_readouts([(slot, _at_zero(sub)) for slot, sub in members], number)
                continue
            self.say(f"round {number + 1}: heads {'-'.join(map(str, widths))} at {entries}")
            self._fit(members, self._recipe(_SHALLOW, epochs, _SHALLOW_ROUNDS[0][1]), number)

    def _without_readouts(self, left: Sequence[Slot]) -> list[Slot]:
        """Fits readouts where some of the rows can be read out; returns the other slots.

        A readout of few rows is a matter of milliseconds, and where it is above the goal that of
        all rows is, too, but for chance.
        """
        rest = []
        for slot in left:
            sub = self._new_shallow(slot, 0, 0)
            trial = None if sub.widths else self._trial(slot, sub)
            if trial is not None and trial.reached:
                self._fit_readouts([(slot, trial.subnetwork)], 0, "readout")
            if not self._is_finished(slot):
                rest.append(slot)
        return rest

    def _trial(self, slot: Slot, sub: Subnetwork) -> TrainedSubnetwork:
        """Fits a readout of the first rows, in a few steps: those of all rows go on from there."""
        features = self.problem.features[slot[0]]
        rows = slice(_TRIAL_ROWS)
        h, targets = features.entry(slot[1])[rows], self.problem.targets[rows]
        level = _MARGIN * self.problem.goal
        return fit_readout(
            self.chain, _at_zero(sub), h, targets, iterations=_TRIAL_STEPS, stop_loss=level
        )

    def _new_shallow(self, slot: Slot, depth: int, number: int) -> Subnetwork:
        """Draws new weights; the seed differs for every round and slot."""
        side, entry = slot
        place = list(self.problem.ends).index(side)
        seed = ((self.problem.seed * 31 + number) * 1009 + entry) * 2 + place % 2
        seed += (place // 2) << 40  # beyond the seeds of the first two networks
        generator = torch.Generator().manual_seed(seed)
        widths = self._shallow_widths(entry, depth)
        return initial(self.chain, entry, self.units[entry], widths, generator)

    def _shallow_widths(self, entry: int, depth: int) -> list[int]:
        """Returns hidden widths that leave room for the neighbouring subnetworks.

        A hidden layer gets the complement of I_p one layer up, I_p the next, and so on. The logits
        go on as 2C units a layer; where these do not fit, the subnetwork goes up to the last layer
        instead.

        Where S_0 can be the first layer and S_1, these have equal layers side by side: then none is
        wider than half of the network's.
        """
        chain, hidden = self.chain, self.chain.length - 1 - entry
        side_by_side = 2 * len(self.units[1]) <= chain.widths[1]

        def available(p: int) -> int:
            kept = len(self.units[p])
            free = chain.widths[p] - kept if (p - entry) % 2 else kept
            return min(free, max(1, chain.widths[p] // 2)) if side_by_side else free

        depth = min(depth, hidden)
        carried = range(entry + depth + 1, chain.length)
        if any(available(p) < 2 * chain.classes for p in carried):
            depth = hidden
        return [available(p) for p in range(entry + 1, entry + 1 + depth)]

    # -- full-depth subnetworks --------------------------------------------------------------------

    def _train_full_depth(self, left: Sequence[Slot], number: int) -> None:
        """Trains full-depth subnetworks, entry layer by entry layer, all networks together."""
        epochs = _FULL_DEPTH_ROUNDS[number]
        for entry in sorted({entry for _, entry in left}, reverse=True):
            members = [(slot, self._start(slot)) for slot in left if slot[1] == entry]
            if entry == self.chain.length - 1 and self.chain.layers[-1].kind == "linear":
                self.say(f"round {number + 1}: readouts at entry layer {entry}")
                self._fit_readouts([(slot, _at_zero(sub)) for slot, sub in members], number)
                continue
            self.say(f"round {number + 1}: subnetworks at entry layer {entry}, {epochs} epochs")
            self._fit(members, self._recipe(_FULL_DEPTH, epochs, _FULL_DEPTH_ROUNDS[0]), number)

    def _start(self, slot: Slot) -> Subnetwork:
        """Returns the best subnetwork so far, or one that begins with what was found above."""
        if slot in self.best:
            return self.best[slot].subnetwork
        side, entry = slot
        if entry == self.chain.length - 1:
            generator = torch.Generator().manual_seed(self.problem.seed)
            return initial(self.chain, entry, self.units[entry], (), generator)
        above = self.best[side, entry + 1].subnetwork
        return first_layer_of(self.chain, self.problem.ends[side], self.units[entry], above)

    # -- both --------------------------------------------------------------------------------------

    def _recipe(self, recipe: Recipe, epochs: int, first: int) -> Recipe:
        """Returns a round's recipe; `first` is the number of epochs of the first round."""
        steps = math.ceil(len(self.problem.targets) / recipe.batch_size) * first
        longer = max(1.0, _STEPS / steps)
        return replace(
            recipe, epochs=math.ceil(epochs * longer), stop_loss=_MARGIN * self.problem.goal
        )

    def _fit_readouts(self, members: Starts, number: int, method: str | None = None) -> None:
        """Fits readouts one by one, each begun where the round before or a trial left off."""
        for slot, sub in members:
            found = self.best.get(slot)
            start = sub if found is None or found.subnetwork.widths else found.subnetwork
            features = self.problem.features[slot[0]]
            fit = partial(
                fit_readout,
                self.chain,
                start,
                features.entry(slot[1]),
                self.problem.targets,
                iterations=_READOUT_ROUNDS[number],
                stop_loss=_MARGIN * self.problem.goal,
            )
            (result,) = self.fits.next([start], partial(_single, fit))
            self._keep(slot, result, method)

    def _fit(self, members: Starts, recipe: Recipe, number: int) -> None:
        """Trains subnetworks of equal shape together."""
        slots = [slot for slot, _ in members]
        starts = [sub for _, sub in members]
        features = [self.problem.features[side].entry(entry) for side, entry in slots]
        targets = self.problem.targets

        def fit(file: Path | None) -> list[TrainedSubnetwork]:
            seed = self.problem.seed * 101 + number
            return train_subnetworks(
                self.chain, starts, features, targets, recipe, seed=seed, checkpoint=file
            )

        for slot, result in zip(slots, self.fits.next(starts, fit)):
            self._keep(slot, result)

    def _keep(self, slot: Slot, result: TrainedSubnetwork, method: str | None = None) -> None:
        """Keeps a result where it is the best of its slot, and adds up the work in any case."""
        before = self.best.get(slot)
        epochs = result.epochs + (before.epochs if before else 0)
        seconds = result.seconds + (before.seconds if before else 0.0)
        if before is None or result.loss < before.loss:
            before = BestSubnetwork(
                result.subnetwork, result.loss, result.error, method or self.kind, epochs, seconds
            )
        self.best[slot] = replace(before, epochs=epochs, seconds=seconds)
        if not math.isfinite(self.best[slot].loss):
            raise ModeconnError(
                f"the subnetwork of entry layer {slot[1]} of {slot[0]} has a loss that is not "
                "finite: expected features and labels that can be fitted; "
                "look for weights or inputs that are too large"
            )


def _resolved(method: str, chain: LayerChain) -> str:
    """Returns the method that "auto" stands for, and any other that the chain bears."""
    reason = why_not_carried(chain, 1)
    if method == "auto":
        return "auto" if reason is None else "trained"
    if method != "trained" and reason is not None:
        raise ModeconnError(
            f'subnetworks="{method}" need identity to carry them to the top: {reason}; '
            'use "trained"'
        )
    return method


def _single(
    fit: Callable[[], TrainedSubnetwork], checkpoint: Path | None
) -> list[TrainedSubnetwork]:
    """Runs a fit of one subnetwork that is too short to be interrupted and resumed."""
    return [fit()]


def _at_zero(sub: Subnetwork) -> Subnetwork:
    """A readout whose weights are zero: where the search for a first one begins."""
    return replace(sub, weights=(torch.zeros_like(sub.weights[0]),))
