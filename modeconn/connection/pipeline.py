"""Joins two networks: subnetworks for both, the constructive path through them, its certificate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.connection.connection import Connection
from modeconn.connection.construct import Breakpoint, breakpoints
from modeconn.connection.features import Features, compute_features
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.search import METHODS, BestSubnetwork, Search, SearchProblem
from modeconn.connection.subnetworks import kept_units
from modeconn.connection.verification import Claims, certify
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.files import locked
from modeconn.parameters import state as states
from modeconn.parameters.paths import PolyChain

Log = Callable[[str], None]

# Without a target the goal is this multiple of the larger loss of the end points, sought in so many
# rounds: a bound of the ends' own order at a fraction of the cost of the search's last round.
_DEFAULT_GOAL = 2
_DEFAULT_ROUNDS = 2
_BATCH = 1000  # samples of a pass that measures the end points


@without_autocast
def connect(
    model: nn.Module,
    a: Any,
    b: Any,
    train: Any,
    kept: float | Sequence[float] = 0.5,
    target: float | None = None,
    test: Any = None,
    subnetworks: str = "auto",
    seed: int = 0,
    *,
    spec: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    log: Log | None = None,
) -> Connection:
    """Finds a path of low loss between two networks, with a certified bound on its loss.

    Implements the construction of Nguyen, Bréchet, Mondelli 2021 ("When Are Solutions Connected in
    Deep Networks?", Theorem 4.1): a subnetwork for every entry layer, on a part of that layer's
    features; from each network down to its subnetwork on the input by rewrites of dead units and
    swings of the output layer. Both sides share the subnetwork on the input. The loss is constant
    on a rewrite and convex on a swing, so its maximum over the whole path is attained at a
    breakpoint.

    Args:
        model: the architecture, a chain of layers (MLP, VGG, …); it is left as it was.
        a, b: the two networks: modules, state dicts or checkpoint files that fit the model.
        train: data that the subnetworks are trained on and the bound holds for, as for `evaluate`;
            targets are class labels.
        kept: fraction of the units of a hidden layer that its subnetwork reads, for all layers or
            for each of layers 1 … L-1.
        target: the loss to get below; the work goes to the entry layers that are above it. None for
            twice the larger loss of the end points, in fewer rounds.
        test: other data to certify as well, on the same path.
        subnetworks: "readout", "head", "trained", or "auto": "head", shallow subnetworks on fixed
            features, where all layers are linear with ReLU, and "trained", full-depth subnetworks,
            each begun from the one above it, elsewhere.
        seed: of the kept units, the subnetworks' weights and the order of the samples.
        spec: text that names the model, kept with the connection.
        folder: keeps the finished subnetworks and those in training: after an interruption the same
            call goes on from there, to the same connection. It may be removed once the connection
            is saved.
        log: called with a line of text now and then.

    Returns:
        the connection; `certificate.outcome` says whether the target is met and, if not, what makes
            the bound.

    Raises:
        ModeconnError: the model is no chain; the networks do not fit it, or have weights that are
            not finite; the data is empty or has one class; there is no room for two subnetworks
            side by side; identity carrying is asked of a network that does not have ReLU; a folder
            that belongs to another search.
    """
    began = time.perf_counter()
    _check_settings(subnetworks, target)
    say = log or _silent
    ends = _load_ends(model, a, b)
    chain = _hidden_chain(model, train)
    units = _kept(chain, kept, seed)
    features = _features(chain, ends, train, units, say)
    goal, rounds = _goal(chain, ends, train, target)
    problem = SearchProblem(chain, ends, features, units, goal, seed)
    with locked(folder):
        found = Search(problem, subnetworks, say, folder).run(rounds)
    points = _breakpoints(chain, ends, found)
    path = PolyChain([point.state for point in points])
    kinds = tuple(point.kind for point in points[1:])
    claims = Claims(kinds, [point.label for point in points], target)
    say("certificate")
    certificate = certify(model, chain, path, train, claims)
    other = None if test is None else certify(model, chain, path, test, claims)
    details = {
        "kept": list(kept) if isinstance(kept, Sequence) else kept,
        "target": target,
        "subnetworks": subnetworks,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "found": _records(found),
    }
    return Connection(path, kinds, certificate, other, spec, details)


def _silent(line: str) -> None:
    """Ignores a line of the log."""


def _check_settings(subnetworks: str, target: float | None) -> None:
    if subnetworks not in METHODS:
        raise ModeconnError(f"subnetworks is {subnetworks!r}: expected one of {', '.join(METHODS)}")
    if target is not None and not target > 0:
        raise ModeconnError(f"target is {target}: expected a positive loss")


def _load_ends(model: nn.Module, a: Any, b: Any) -> dict[str, states.State]:
    """Loads both networks and checks that they fit the model and are finite."""
    ends = {"a": states.load(a), "b": states.load(b)}
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


def _kept(chain: LayerChain, kept: float | Sequence[float], seed: int) -> dict[int, Tensor]:
    """Draws I_l for every entry layer: all inputs, and random units of each hidden layer.

    Both networks keep the same units, so that they can share the subnetwork on the input.
    """
    hidden = chain.length - 1
    fractions = list(kept) if isinstance(kept, Sequence) else [kept] * hidden
    if len(fractions) != hidden:
        raise ModeconnError(
            f"kept has {len(fractions)} numbers: "
            f"expected one, or {hidden} for the hidden layers of {chain.name}"
        )
    units = {0: torch.arange(chain.widths[0])}
    for p, fraction in enumerate(fractions, 1):
        n = chain.widths[p]
        if not 0 < fraction < 1 or not 1 <= round(fraction * n) < n:
            raise ModeconnError(
                f"kept is {fraction} for layer {p} of {n} units: "
                "expected a fraction that leaves units both to keep and to use"
            )
        # A prime factor keeps the layers' seeds apart for different seeds of the search.
        generator = torch.Generator().manual_seed(seed * 1009 + p)
        units[p] = kept_units(n, round(fraction * n), generator)
    return units


def _features(
    chain: LayerChain,
    ends: Mapping[str, states.State],
    train: Any,
    units: Mapping[int, Tensor],
    say: Log,
) -> dict[str, Features]:
    """Computes the kept features of both networks and checks the labels."""
    features = {}
    for name, end in ends.items():
        say(f"features of {name}")
        features[name] = compute_features(chain, end, train, kept=units)
    _check_labels(chain, features["a"].labels)
    return features


def _check_labels(chain: LayerChain, labels: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= chain.classes:
        raise ModeconnError(
            f"labels run from {low} to {high}, but {chain.name} has {chain.classes} outputs"
        )
    if low == high:
        raise ModeconnError(
            f"all {len(labels):,} samples have the label {low}: expected at least two classes"
        )


def _goal(
    chain: LayerChain, ends: Mapping[str, states.State], train: Any, target: float | None
) -> tuple[float, int | None]:
    """Returns the loss to search for, and the number of rounds (None for all)."""
    if target is not None:
        return target, None
    return _DEFAULT_GOAL * max(_losses(chain, ends, train)), _DEFAULT_ROUNDS


def _losses(chain: LayerChain, ends: Mapping[str, states.State], train: Any) -> list[float]:
    """Computes the training losses of the end points, summed in float64."""
    totals, samples = dict.fromkeys(ends, 0.0), 0
    with torch.no_grad():
        for x, y in as_batches(train, _BATCH):
            for name, end in ends.items():
                logits = chain.run(end, x.to(end[chain.layers[-1].weight]))
                losses = nn.functional.cross_entropy(logits, y.long(), reduction="none")
                totals[name] += float(losses.double().sum())
            samples += len(x)
    return [total / samples for total in totals.values()]


def _breakpoints(
    chain: LayerChain,
    ends: Mapping[str, states.State],
    found: Mapping[str, Sequence[BestSubnetwork]],
) -> list[Breakpoint]:
    """Builds the path through the subnetworks that were found."""
    of_a = [each.subnetwork for each in found["a"]]
    of_b = [each.subnetwork for each in found["b"]]
    return breakpoints(chain, ends["a"], of_a, ends["b"], of_b)


def _records(found: Mapping[str, Sequence[BestSubnetwork]]) -> list[dict[str, Any]]:
    """Describes the subnetworks of both sides, as the connection's details keep them."""
    records = []
    for side, subnetworks in found.items():
        records += [each.to_dict(side) for each in subnetworks]
    return records
