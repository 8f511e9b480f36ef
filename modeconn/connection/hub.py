"""Connects many networks through a hub, and checks such a star, in time linear in their number."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modeconn.connection.certificate import Certificate, FalseCertificate
from modeconn.connection.certifying import certify_made
from modeconn.connection.connection import Connection
from modeconn.connection.construct import Breakpoint, descents
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.segment_kinds import REWRITE, State, classify_segment
from modeconn.connection.solution import Log, Settings, Solution, solve
from modeconn.connection.star import Join, Pair, Star
from modeconn.connection.verification import Claims, verify
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.parameters.paths import PolyChain


def named(networks: Sequence[Any]) -> dict[str, Any]:
    """Names networks a, b, …; n27 and so on beyond the alphabet.

    Raises:
        ModeconnError: there are fewer than two.
    """
    if len(networks) < 2:
        raise ModeconnError(f"networks are {len(networks)}: expected at least two to connect")
    letters = string.ascii_lowercase
    names = [letters[k] if k < len(letters) else f"n{k + 1}" for k in range(len(networks))]
    return dict(zip(names, networks))


def connect_star(
    model: nn.Module,
    networks: Sequence[Any],
    train: Any,
    test: Any,
    settings: Settings,
    spec: str | None,
    say: Log,
) -> tuple[Star, Solution]:
    """Connects all pairs of several networks through one subnetwork on the input.

    Args:
        model: the architecture. networks: modules, state dicts or files that fit it.
        train, test: data, as for `connect`.
        settings: checked already.
        spec: text that names the model.
        say: called with a line of text now and then.

    Returns:
        the star without details, and the subnetworks that it is made of.
    """
    solution = solve(model, named(networks), train, settings, say)
    subnetworks = {name: solution.subnetworks(name) for name in solution.found}
    walks = descents(solution.chain, solution.ends, subnetworks)
    rays = {}
    for name, walk in zip(solution.ends, walks):
        rays[name] = _certified(model, solution.chain, walk, (train, test), settings, spec, say)
    hubs = {name: walk[-1].state for name, walk in zip(solution.ends, walks)}
    return Star(rays, _joins(solution.chain, hubs), spec), solution


def _certified(
    model: nn.Module,
    chain: LayerChain,
    walk: Sequence[Breakpoint],
    data: tuple[Any, Any],
    settings: Settings,
    spec: str | None,
    say: Log,
) -> Connection:
    """Certifies one descent as a connection from a network to the hub."""
    path = PolyChain([point.state for point in walk])
    kinds = tuple(point.kind for point in walk[1:])
    # Each descent is a connection of its own, which begins in "a".
    name = walk[0].label
    labels = ["a", *(point.label.replace(f" of {name}", " of a") for point in walk[1:])]
    claims = Claims(kinds, labels, settings.target, settings.loss)
    what = f"certificate of {name}"
    both = certify_made(model, chain, path, data, claims, say, settings.folder, what)
    return Connection(path, kinds, *both, spec)


def _joins(chain: LayerChain, hubs: Mapping[str, State]) -> dict[Pair, Join]:
    """Classifies the segment between the ends of any two descents, from the weights.

    Raises:
        ModeconnError: one of them is no rewrite of dead units.
    """
    joins = {}
    for first, second in itertools.combinations(hubs, 2):
        found = classify_segment(chain, hubs[first], hubs[second])
        if found.kind != REWRITE:
            raise ModeconnError(
                f"the descents of {first} and {second} do not end in the same hub: "
                f"their ends are joined by a {found.kind} ({found.text})"
            )
        joins[first, second] = Join(found.moved, found.text)
    return joins


def verify_star(
    model: nn.Module,
    star: Star,
    data: Any,
    ends: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Certificate]:
    """Recomputes the certificates of all descents and the joins of all pairs.

    Args:
        model: the architecture.
        star: from `connect` or `Star.load`.
        data: as for `verify`.
        ends: networks by name that the descents should begin in, bit for bit.
        options: further arguments of `verify`.

    Returns:
        by name the certificate of each descent. That of a pair is made of two of them, whose
        numbers are these.

    Raises:
        FalseCertificate: says what is false.
        ModeconnError: as `verify`.
    """
    found = {}
    for name in star.names:
        found[name] = _verified(model, name, star, data, {"a": (ends or {}).get(name), **options})
    sample = next(iter(as_batches(data, 4)))[0]
    chain = LayerChain.of(model, sample.float())
    hubs = {name: each.path.control_points[-1] for name, each in star.descents.items()}
    try:
        own = _joins(chain, hubs)
    except ModeconnError as error:
        raise FalseCertificate(str(error)) from error
    for pair, join in own.items():
        if set(star.joins[pair].moved) != set(join.moved):
            raise FalseCertificate(
                f"the join of {' and '.join(pair)} is said to move other tensors than it does"
            )
    return found


def _verified(
    model: nn.Module, name: str, star: Star, data: Any, options: Mapping[str, Any]
) -> Certificate:
    """Verifies one descent; a false certificate is named."""
    try:
        return verify(model, star.descents[name], data, **options)
    except FalseCertificate as error:
        raise FalseCertificate(f"descent of {name}: {error}") from error
