"""Connect two networks: subnetworks for both, the constructive path through them, and its certificate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.connection.chain import Chain
from modeconn.connection.connection import Connection
from modeconn.connection.construct import breakpoints
from modeconn.connection.features import compute_features
from modeconn.connection.search import METHODS, Search
from modeconn.connection.subnetworks import kept_units
from modeconn.connection.verification import certify
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.parameters import state as states
from modeconn.parameters.paths import PolyChain

Log = Callable[[str], None]


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
    """A path of low loss between two networks, with a certified bound on its loss.

    The construction of Nguyen, Bréchet, Mondelli 2021 ("When Are Solutions Connected in Deep
    Networks?"): for every entry layer a subnetwork on a part of its features; from each network
    down to its subnetwork on the input by rewrites of dead units and swings of the last layer; both
    sides share the subnetwork on the input. The loss is constant on a rewrite and convex on a
    swing, so its maximum over the whole path is that at a break point.

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
        subnetworks: "readout", "head", "trained", or "auto": heads on fixed features where all
            layers are linear with ReLU, full-depth subnetworks, each begun from the one above it,
            elsewhere.
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
    if subnetworks not in METHODS:
        raise ModeconnError(f"subnetworks is {subnetworks!r}: expected one of {', '.join(METHODS)}")
    if target is not None and not target > 0:
        raise ModeconnError(f"target is {target}: expected a positive loss")
    ends = {"a": states.load(a), "b": states.load(b)}
    names = [f"the model {type(model).__name__}", *ends]
    states.match([model.state_dict(), *ends.values()], names, devices=False, dtypes=False)
    for name, end in ends.items():
        states.check(end, name)
    say = log or (lambda line: None)
    sample = next(iter(as_batches(train, 16)))[0]
    chain = Chain.of(model, sample.float())
    if chain.length < 2:
        raise ModeconnError(
            f"{chain.name} has no hidden layer: the straight line between two linear models is a swing already"
        )
    units = _kept(chain, kept, seed)
    features = {}
    for name, end in ends.items():
        say(f"features of {name}")
        features[name] = compute_features(chain, end, train, kept=units)
    _check_labels(chain, features["a"].labels)
    goal, rounds = (
        (target, None) if target is not None else (2 * max(_losses(chain, ends, train)), 2)
    )
    search = Search(chain, ends, features, units, subnetworks, goal, seed, say, folder)
    found = search.run(rounds)
    steps = breakpoints(
        chain,
        ends["a"],
        [f.subnetwork for f in found["a"]],
        ends["b"],
        [f.subnetwork for f in found["b"]],
    )
    path = PolyChain([step.state for step in steps])
    kinds, labels = [step.kind for step in steps[1:]], [step.label for step in steps]
    say("certificate")
    certificate = certify(model, chain, path, train, kinds, target, labels)
    other = None if test is None else certify(model, chain, path, test, kinds, target, labels)
    details = {
        "kept": list(kept) if isinstance(kept, Sequence) else kept,
        "target": target,
        "subnetworks": subnetworks,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "found": [f.to_dict(side) for side in found for f in found[side]],
    }
    return Connection(path, tuple(kinds), certificate, other, spec, details)


def _kept(chain: Chain, kept: float | Sequence[float], seed: int) -> dict[int, Tensor]:
    """I_l of every entry layer: all inputs, and a random part of each hidden layer, the same for both networks."""
    hidden = chain.length - 1
    fractions = list(kept) if isinstance(kept, Sequence) else [kept] * hidden
    if len(fractions) != hidden:
        raise ModeconnError(
            f"kept has {len(fractions)} numbers: expected one, or {hidden} for the hidden layers of {chain.name}"
        )
    units = {0: torch.arange(chain.widths[0])}
    for p, fraction in enumerate(fractions, 1):
        n = chain.widths[p]
        if not 0 < fraction < 1 or not 1 <= round(fraction * n) < n:
            raise ModeconnError(
                f"kept is {fraction} for layer {p} of {n} units: expected a fraction that leaves units both to keep and to use"
            )
        generator = torch.Generator().manual_seed(seed * 1009 + p)
        units[p] = kept_units(n, round(fraction * n), generator)
    return units


def _check_labels(chain: Chain, labels: Tensor) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= chain.classes:
        raise ModeconnError(
            f"labels run from {low} to {high}, but {chain.name} has {chain.classes} outputs"
        )
    if low == high:
        raise ModeconnError(
            f"all {len(labels):,} samples have the label {low}: expected at least two classes"
        )


def _losses(chain: Chain, ends: Mapping[str, Mapping[str, Tensor]], train: Any) -> list[float]:
    """Training losses of the end points."""
    totals, samples = dict.fromkeys(ends, 0.0), 0
    with torch.no_grad():
        for x, y in as_batches(train, 1000):
            for name, end in ends.items():
                logits = chain.run(end, x.to(end[chain.layers[-1].weight]))
                totals[name] += float(
                    nn.functional.cross_entropy(logits, y.long(), reduction="none").double().sum()
                )
            samples += len(x)
    return [total / samples for total in totals.values()]
