"""Finds subnetworks for every entry layer of several networks, by whichever way is asked for."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.connection.closed_form import Found, Solved
from modeconn.connection.features import Features, compute_features
from modeconn.connection.kept import activity, drawn_units
from modeconn.connection.labels import check_range, check_several
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.loss_bounds import CertifiedLoss
from modeconn.connection.memorising import memorised, memorises, memorising_subnetworks
from modeconn.connection.positions import fits_below
from modeconn.connection.rounds import METHODS as SEARCHES
from modeconn.connection.rounds import Search, SearchProblem
from modeconn.connection.separable import separable_subnetworks
from modeconn.connection.subnetworks import Subnetwork
from modeconn.connection.targets import Targets
from modeconn.connection.trained_subnetwork import BestSubnetwork
from modeconn.connection.training import measure
from modeconn.connection.warm_start import input_subnetwork
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.files.writing import locked
from modeconn.metrics.convexity import Loss, check_convex, name_of
from modeconn.parameters import state as states
from modeconn.parameters.fitting import load_for

Log = Callable[[str], None]

CLOSED_FORMS = ("separable", "memorise")
METHODS = (*SEARCHES, *CLOSED_FORMS)
# Without a target the goal is the larger loss of the end points and a little more, sought in so
# many rounds: a bound of the ends' own order at a fraction of the cost of the search's last round.
_DEFAULT_GOAL = 1.05
DEFAULT_ROUNDS = 2
_BATCH = 1000  # samples of a pass that measures the end points


@dataclass(frozen=True)
class Settings:
    """Settings of the subnetworks, as `connect` takes them."""

    kept: float | Sequence[float]
    target: float | None
    subnetworks: str
    seed: int
    folder: str | os.PathLike[str] | None = None
    loss: Loss = "cross_entropy"

    def check(self) -> None:
        """Raises a ModeconnError for a setting out of range."""
        if self.subnetworks not in METHODS:
            raise ModeconnError(
                f"subnetworks is {self.subnetworks!r}: expected one of {', '.join(METHODS)}"
            )
        if self.target is not None and not self.target > 0:
            raise ModeconnError(f"target is {self.target}: expected a positive loss")
        check_convex(self.loss)
        if self.subnetworks in CLOSED_FORMS and name_of(self.loss) != "cross_entropy":
            raise ModeconnError(
                f"subnetworks={self.subnetworks!r} are for cross-entropy of class labels, and loss "
                f'is {name_of(self.loss)}: use "auto"'
            )


@dataclass(frozen=True, eq=False)
class Solution:
    """Subnetworks of several networks.

    Attributes:
        chain: the architecture.
        ends: the weights of the networks by name, in the precision of the path.
        found: of each network S_0 … S_{L-1}; S_0 is the same in all.
    """

    chain: LayerChain
    ends: Mapping[str, states.State]
    found: Mapping[str, Sequence[BestSubnetwork]]

    @property
    def worst(self) -> float:
        """The largest loss of a subnetwork."""
        every = itertools.chain.from_iterable(self.found.values())
        return max(each.loss for each in every)

    def subnetworks(self, name: str) -> list[Subnetwork]:
        """Returns the subnetworks of one network."""
        return [each.subnetwork for each in self.found[name]]

    def records(self) -> list[dict[str, Any]]:
        """Describes the subnetworks of all networks, as a connection's details keep them."""
        records = []
        for side, subnetworks in self.found.items():
            records += [each.to_dict(side) for each in subnetworks]
        return records


def solve(
    model: nn.Module, networks: Mapping[str, Any], train: Any, settings: Settings, say: Log
) -> Solution:
    """Finds subnetworks of all entry layers of all networks.

    Args:
        model: the architecture.
        networks: by name; modules, state dicts or checkpoint files.
        train: the data, with class labels.
        settings: checked already.
        say: called with a line of text now and then.

    Raises:
        ModeconnError: see `connect`.
    """
    ends = load_ends(model, networks)
    chain = _hidden_chain(model, train)
    chain.fixed.check_same(ends)
    active = activity(chain, ends, train)
    units = drawn_units(chain, settings.kept, active, settings.seed)
    task = _Task(chain, ends, train, settings, say, units, active)
    if settings.subnetworks in CLOSED_FORMS:
        return task.closed(settings.subnetworks)
    found = task.searched()
    plain = name_of(settings.loss) == "cross_entropy"
    if settings.subnetworks == "auto" and settings.target is not None and plain:
        return task.improved(found)
    return found


@dataclass(frozen=True, eq=False)
class _Task:
    """Networks and data for which subnetworks are to be found."""

    chain: LayerChain
    ends: Mapping[str, states.State]
    train: Any
    settings: Settings
    say: Log
    units: dict[int, Tensor]
    active: Mapping[int, Tensor]

    def searched(self) -> Solution:
        """Trains subnetworks."""
        settings = self.settings
        features = self._features(self.ends, self.units)
        goal, rounds = self._goal()
        values = next(iter(features.values())).labels
        problem = SearchProblem(
            chain=self.chain,
            ends=self.ends,
            features=features,
            units=self.units,
            targets=Targets.with_loss(values, settings.loss, self.chain.classes),
            goal=goal,
            seed=settings.seed,
        )
        with locked(settings.folder):
            found = Search(problem, settings.subnetworks, self.say, settings.folder).run(rounds)
        return Solution(self.chain, self.ends, found)

    def improved(self, found: Solution) -> Solution:
        """Takes closed forms instead of what was found, where that is above the target."""
        target, samples = self.settings.target or 0.0, _samples(self.train)
        above = (
            found.worst
            > target
            >= max(_losses(self.chain, self.ends, self.train, self.settings.loss)[:-1])
        )
        if not above or not memorises(self.chain, self.units, samples):
            return found
        try:
            other = self.closed("memorise")
        except ModeconnError as error:
            self.say(str(error))
            return found
        return other if other.worst < found.worst else found

    def closed(self, method: str) -> Solution:
        """Builds subnetworks without training; memorising ones need float64."""
        ends = self.ends if method == "separable" else _doubled(self.ends)
        problem = Solved(
            chain=self.chain,
            ends=ends,
            features=self._features(ends, {}),
            units=dict(self.units),
            activity=self.active,
            goal=self._goal()[0],
            say=self.say,
        )
        build = separable_subnetworks if method == "separable" else memorising_subnetworks
        built = build(problem)
        return Solution(self.chain, ends, _completed(problem, built, method))

    def _features(
        self, ends: Mapping[str, states.State], kept: Mapping[int, Tensor]
    ) -> dict[str, Features]:
        """Computes the features of all networks, of some units or all, and checks the labels."""
        features, of_classes = {}, CertifiedLoss(self.settings.loss).has_error
        for name, end in ends.items():
            self.say(f"features of {name}")
            features[name] = compute_features(
                self.chain, end, self.train, kept=kept, of_classes=of_classes
            )
        if of_classes:
            labels = next(iter(features.values())).labels
            check_range(labels, self.chain.classes, self.chain.name)
            check_several(labels)
        return features

    def _goal(self) -> tuple[float, int | None]:
        """Returns the loss to search for, and the number of rounds (None for all)."""
        if self.settings.target is not None:
            return self.settings.target, None
        *losses, zero = _losses(self.chain, self.ends, self.train, self.settings.loss)
        return default_goal(max(losses), zero), DEFAULT_ROUNDS


def default_goal(largest: float, zero: float) -> float:
    """Returns the loss to search for where no target is given.

    That is hardly more than the larger loss of the end points, and below the loss of outputs that
    are all 0: a path through the zero function says nothing.

    Args:
        largest: loss of an end point.
        zero: the loss of outputs that are all 0.
    """
    if largest < zero:
        return min(_DEFAULT_GOAL * largest, 0.5 * (largest + zero))
    return 0.99 * zero


def _completed(problem: Solved, built: Found, method: str) -> dict[str, list[BestSubnetwork]]:
    """Adds S_0 to subnetworks of closed form: the first layer of the best network, then its S_1.

    Raises:
        ModeconnError: layer 1 has no room for it.
    """
    chain, names = problem.chain, list(problem.ends)
    side = min(names, key=lambda name: built[name, 1].loss)
    shared = input_subnetwork(chain, problem.ends[side], built[side, 1].subnetwork)
    above = [built[name, 1].subnetwork for name in names]
    if shared is not None and fits_below(chain, shared, above):
        h, labels = problem.features[side].entry(0), problem.labels
        first = BestSubnetwork(shared, *measure(chain, shared, h, labels), method, 0, 0.0)
    elif method == "memorise" and chain.length > 1:
        result = memorised(problem, side, 0)
        first = BestSubnetwork.of(result, method)
    else:
        raise ModeconnError(
            f'subnetworks="{method}": the subnetwork on the input is the first layer on the kept '
            f"units, then S_1, and there is no room for it beside S_1 in {chain.name}: keep at "
            "most half of the units of layer 1, or use wider layers"
        )
    found = {}
    for name in names:
        own = [built[name, entry] for entry in range(1, chain.length)]
        found[name] = [first, *(BestSubnetwork.of(each, method) for each in own)]
    return found


def _doubled(ends: Mapping[str, states.State]) -> dict[str, states.State]:
    """Widens all weights to float64, which is exact."""
    doubled = {}
    for name, end in ends.items():
        doubled[name] = {k: v.double() if v.is_floating_point() else v for k, v in end.items()}
    return doubled


def load_ends(model: nn.Module, networks: Mapping[str, Any]) -> dict[str, states.State]:
    """Loads all networks and checks that they fit the model and are finite."""
    ends = {name: load_for(model, network) for name, network in networks.items()}
    names = [f"the model {type(model).__name__}", *ends]
    states.match([model.state_dict(), *ends.values()], names, devices=False, dtypes=False)
    for name, end in ends.items():
        states.check(end, name)
    return ends


def _hidden_chain(model: nn.Module, train: Any) -> LayerChain:
    """Finds the model's chain of layers, which must have a hidden one."""
    sample = next(iter(as_batches(train, 16)))[0]
    chain = LayerChain.of(model, sample.float())
    if chain.length < 2:
        raise ModeconnError(
            f"{chain.name} has no hidden layer: "
            "the straight line between two linear models is a swing already"
        )
    return chain


def _losses(
    chain: LayerChain, ends: Mapping[str, states.State], train: Any, loss: Loss
) -> list[float]:
    """Computes the training losses of the networks, and of outputs 0, summed in float64."""
    certified = CertifiedLoss(loss)
    totals, count = dict.fromkeys([*ends, ""], 0.0), 0.0
    with torch.no_grad():
        for x, y in as_batches(train, _BATCH):
            zero = torch.zeros(len(x), chain.classes, dtype=torch.float64)
            fitted = certified.fit(zero, y.cpu())
            totals[""] += certified.total(zero, fitted)
            for name, end in ends.items():
                outputs = chain.run(end, x.to(end[chain.layers[-1].weight])).double()
                totals[name] += certified.total(outputs.cpu(), fitted)
            count += certified.count(fitted)
    return [total / count for total in totals.values()]


def _samples(data: Any) -> int:
    """Counts the samples of a data set, by a pass over it where it does not say."""
    batches = as_batches(data, _BATCH)
    return batches.samples or sum(len(x) for x, _ in batches)
