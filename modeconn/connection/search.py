"""The search for subnetworks of low loss, from cheap to dear: more is spent only where the bound is made."""

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

from modeconn.connection.chain import Chain
from modeconn.connection.features import Features
from modeconn.connection.readout import fit_readout
from modeconn.connection.resume import Fits, search_settings
from modeconn.connection.subnetworks import Subnetwork, initial, why_not_carried
from modeconn.connection.trained import Trained
from modeconn.connection.training import Recipe, train_subnetworks
from modeconn.errors import ModeconnError

METHODS = ("auto", "readout", "head", "trained")
# A subnetwork stops a little below the target: the bound is taken in another order of summation.
_MARGIN = 0.95
# Hidden layers of a head and epochs, round after round. Measured on two 10 × 245 MNIST networks,
# half of the units kept: at entry layer 1, two hidden layers reach 0.001 in 20 epochs, three 0.0008
# in 16.
_HEADS = ((2, 20), (3, 30), (3, 60))
# Steps of L-BFGS for a readout, round after round.
_READOUTS = (300, 1000, 3000)
_HEAD = Recipe(lr=4e-3, batch_size=256, schedule="onecycle", weight_decay=1e-4)
# Epochs of subnetworks that begin with trained weights, round after round.
_EPOCHS = (6, 12, 24)
# Epochs of a small data set are short: the first round takes at least so many steps, and the others
# more in proportion.
_STEPS = 2000
_TRAINED = Recipe(lr=1e-3, batch_size=128, schedule="onecycle", weight_decay=1e-4)


@dataclass(frozen=True)
class Found:
    """The best subnetwork so far of one entry layer of one network."""

    subnetwork: Subnetwork
    loss: float
    error: float
    method: str
    epochs: int
    seconds: float

    def to_dict(self, side: str) -> dict[str, Any]:
        """What a connection keeps of it."""
        sub = self.subnetwork
        return {
            "side": side,
            "entry": sub.entry,
            "method": self.method,
            "kept": len(sub.kept),
            "units": sub.kept.tolist(),
            "widths": list(sub.widths),
            "loss": self.loss,
            "error": self.error,
            "epochs": self.epochs,
            "seconds": round(self.seconds, 2),
        }


# One network's name and an entry layer; the subnetwork on the input belongs to both and is listed
# under "a".
Place = tuple[str, int]


class Search:
    """Finds a subnetwork for every entry layer of both networks; that of entry layer 0 is shared.

    Args:
        ends, features: of the networks "a" and "b".
        units: I_l by entry layer.
        goal: the loss to get to.
        folder: keeps the finished fits and the unfinished one, so that the same search goes on from
            there.
    """

    def __init__(
        self,
        chain: Chain,
        ends: Mapping[str, Mapping[str, Tensor]],
        features: Mapping[str, Features],
        units: Mapping[int, Tensor],
        method: str,
        goal: float,
        seed: int,
        say: Callable[[str], None],
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.chain, self.ends, self.features, self.units = chain, ends, features, units
        self.goal, self.seed, self.say = goal, seed, say
        self.method = (
            method
            if method != "auto"
            else "head"
            if why_not_carried(chain, 1) is None
            else "trained"
        )
        if self.method != "trained":
            reason = why_not_carried(chain, 1)
            if reason is not None:
                raise ModeconnError(
                    f'subnetworks="{self.method}" need identity to carry them to the top: {reason}; use "trained"'
                )
        self.best: dict[Place, Found] = {}
        settings = (
            {}
            if folder is None
            else search_settings(ends, features, units, method=self.method, goal=goal, seed=seed)
        )
        self.fits = Fits(folder, settings)

    def run(self, rounds: int | None = None) -> dict[str, list[Found]]:
        """Round after round, until every entry layer is at the goal or the rounds are over."""
        plans: Sequence[Any] = {
            "head": _HEADS,
            "readout": ((0, 0),) * len(_READOUTS),
            "trained": _EPOCHS,
        }[self.method]
        for number, plan in enumerate(plans[:rounds]):
            left = [
                place
                for place in self._places()
                if place not in self.best or self.best[place].loss > self.goal
            ]
            if not left:
                break
            if self.method == "trained":
                self._train(left, plan, number)
            else:
                self._train_heads(left, plan[0], plan[1], number)
            worst = max(self.best, key=lambda place: self.best[place].loss)
            self.say(
                f"round {number + 1}: worst is entry layer {worst[1]} of {worst[0]}, loss {self.best[worst].loss:.4g}"
            )
        shared = self.best["a", 0]
        return {
            side: [shared, *(self.best[side, entry] for entry in range(1, self.chain.length))]
            for side in self.ends
        }

    def _places(self) -> list[Place]:
        """All places, from the top layer down, so that each can begin with what was found above it."""
        top = reversed(range(1, self.chain.length))
        return [*((side, entry) for entry in top for side in self.ends), ("a", 0)]

    # -- heads on fixed features -------------------------------------------------------------------

    def _train_heads(self, left: Sequence[Place], depth: int, epochs: int, number: int) -> None:
        """Heads of equal shape are trained together, those of both networks and of all entry layers."""
        groups: dict[tuple[int, ...], list[tuple[Place, Subnetwork]]] = {}
        for side, entry in left:
            generator = torch.Generator().manual_seed(
                ((self.seed * 31 + number) * 1009 + entry) * 2 + (side == "b")
            )
            sub = initial(
                self.chain, entry, self.units[entry], self._head_widths(entry, depth), generator
            )
            groups.setdefault((len(sub.kept), *sub.widths), []).append(((side, entry), sub))
        for members in groups.values():
            entries = ", ".join(f"{side}{entry}" for (side, entry), _ in members)
            if not members[0][1].widths:
                self.say(f"round {number + 1}: readouts at {entries}")
                self._fit_readouts(members, number)
                continue
            self.say(
                f"round {number + 1}: heads {'-'.join(map(str, members[0][1].widths))} at {entries}"
            )
            self._fit(members, self._recipe(_HEAD, epochs, _HEADS[0][1]), number)

    def _head_widths(self, entry: int, depth: int) -> list[int]:
        """Hidden widths that always leave room: the complement of I_p one layer up, I_p the next, and so on.

        The logits go on as 2C units a layer; where these do not fit, the head goes up to the last
        layer instead.
        """
        chain, hidden = self.chain, self.chain.length - 1 - entry

        def region(p: int) -> int:
            kept = len(self.units[p])
            return chain.widths[p] - kept if (p - entry) % 2 else kept

        depth = min(depth, hidden)
        if any(region(p) < 2 * chain.classes for p in range(entry + depth + 1, chain.length)):
            depth = hidden
        return [region(p) for p in range(entry + 1, entry + 1 + depth)]

    # -- full-depth subnetworks --------------------------------------------------------------------

    def _train(self, left: Sequence[Place], epochs: int, number: int) -> None:
        """Each entry layer in turn, both networks together."""
        for entry in sorted({entry for _, entry in left}, reverse=True):
            places = [place for place in left if place[1] == entry]
            members = [
                (place, self.best[place].subnetwork if place in self.best else self._begun(*place))
                for place in places
            ]
            if entry == self.chain.length - 1:
                self.say(f"round {number + 1}: readouts at entry layer {entry}")
                self._fit_readouts(members, number)
                continue
            self.say(f"round {number + 1}: subnetworks at entry layer {entry}, {epochs} epochs")
            self._fit(members, self._recipe(_TRAINED, epochs, _EPOCHS[0]), number)

    def _begun(self, side: str, entry: int) -> Subnetwork:
        """A subnetwork to begin with: the network's own layer l+1 between kept units, then the subnetwork found above."""
        chain, layer = self.chain, self.chain.layer(entry + 1)
        if entry == chain.length - 1:
            return initial(
                chain, entry, self.units[entry], (), torch.Generator().manual_seed(self.seed)
            )
        above = self.best[side, entry + 1].subnetwork
        state, kept = self.ends[side], self.units[entry + 1]
        # As many of the units that the subnetwork above reads as have room beside it.
        count = min(len(kept), chain.widths[entry + 1] - len(kept))
        own = layer.select(state[layer.weight][kept[:count]], self.units[entry])
        bias = None if layer.bias is None else state[layer.bias][kept[:count]]
        first = chain.layer(entry + 2).select(above.weights[0], torch.arange(count))
        weights, biases = (own, first, *above.weights[1:]), (bias, *above.biases)
        return _without_norm(
            chain, entry, state, kept[:count], Subnetwork(entry, self.units[entry], weights, biases)
        )

    # -- both --------------------------------------------------------------------------------------

    def _recipe(self, recipe: Recipe, epochs: int, first: int) -> Recipe:
        """A round's recipe; `first` is the number of epochs of the first round."""
        steps = math.ceil(len(self.features["a"]) / recipe.batch_size) * first
        return replace(
            recipe,
            epochs=math.ceil(epochs * max(1.0, _STEPS / steps)),
            stop_loss=_MARGIN * self.goal,
        )

    def _fit_readouts(self, members: Sequence[tuple[Place, Subnetwork]], number: int) -> None:
        """Convex problems, one by one, each begun where the round before left off, or at zero."""
        for place, sub in members:
            found = self.best.get(place)
            start = (
                found.subnetwork
                if found
                else replace(sub, weights=(torch.zeros_like(sub.weights[0]),))
            )
            features = self.features[place[0]]
            fit = partial(
                fit_readout,
                self.chain,
                start,
                features.entry(place[1]),
                features.labels,
                iterations=_READOUTS[number],
                stop_loss=_MARGIN * self.goal,
            )
            self._keep(place, *self.fits.next([start], lambda _, fit=fit: [fit()]))  # type: ignore[misc]

    def _fit(
        self, members: Sequence[tuple[Place, Subnetwork]], recipe: Recipe, number: int
    ) -> None:
        places = [place for place, _ in members]
        tensors = [self.features[side].entry(entry) for side, entry in places]
        labels = self.features["a"].labels
        starts = [sub for _, sub in members]

        def fit(file: Path | None) -> list[Trained]:
            seed = self.seed * 101 + number
            return train_subnetworks(
                self.chain, starts, tensors, labels, recipe, seed=seed, checkpoint=file
            )

        trained = self.fits.next(starts, fit)
        for place, result in zip(places, trained):
            self._keep(place, result)

    def _keep(self, place: Place, result: Trained) -> None:
        before = self.best.get(place)
        epochs = result.epochs + (before.epochs if before else 0)
        seconds = result.seconds + (before.seconds if before else 0.0)
        if before is None or result.loss < before.loss:
            before = Found(
                result.subnetwork, result.loss, result.error, self.method, epochs, seconds
            )
        self.best[place] = replace(before, epochs=epochs, seconds=seconds)
        if not math.isfinite(self.best[place].loss):
            raise ModeconnError(
                f"the subnetwork of entry layer {place[1]} of {place[0]} has a loss that is not finite"
            )


def _without_norm(
    chain: Chain, entry: int, state: Mapping[str, Tensor], units: Tensor, sub: Subnetwork
) -> Subnetwork:
    """A first layer with its batch norm folded in where that is exact: the norm follows the affine map at once."""
    layer = chain.layer(entry + 1)
    norm = layer.norm
    if norm is None or norm.mean is None or norm.var is None or layer.steps[0].op != "batch_norm":
        return sub
    scale = torch.rsqrt(state[norm.var][units] + norm.eps)
    if norm.weight is not None:
        scale = scale * state[norm.weight][units]
    shift = -state[norm.mean][units] * scale
    if norm.bias is not None:
        shift = shift + state[norm.bias][units]
    weight = sub.weights[0] * scale.view(-1, *[1] * (sub.weights[0].dim() - 1))
    bias = sub.biases[0]
    # a convolution without a bias cannot take the shift: training makes up for it
    if bias is not None:
        bias = bias * scale + shift
    return replace(sub, weights=(weight, *sub.weights[1:]), biases=(bias, *sub.biases[1:]))
