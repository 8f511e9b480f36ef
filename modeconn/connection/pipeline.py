"""Joins two networks: subnetworks for both, the constructive path through them, its certificate."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn

from modeconn.backends.precision import without_autocast
from modeconn.connection.captured.structure import CapturedStructure
from modeconn.connection.certifying import certify_made
from modeconn.connection.connection import Connection
from modeconn.connection.construct import Breakpoint, breakpoints
from modeconn.connection.hub import connect_star
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.residual.solution import (
    ResidualSolution,
    residual_network,
    solve_residual,
)
from modeconn.connection.solution import Settings, Solution, solve
from modeconn.connection.star import Star
from modeconn.connection.structure import Structure
from modeconn.connection.verification import Claims
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.metrics.convexity import Loss, name_of
from modeconn.parameters.paths import PolyChain

Log = Callable[[str], None]


@overload
def connect(
    model: nn.Module,
    a: list[Any] | tuple[Any, ...],
    b: None = None,
    train: Any = ...,
    kept: float | Sequence[float] = ...,
    target: float | None = ...,
    test: Any = ...,
    subnetworks: str = ...,
    seed: int = ...,
    *,
    loss: Loss = ...,
    spec: str | None = ...,
    folder: str | os.PathLike[str] | None = ...,
    log: Log | None = ...,
) -> Star: ...


@overload
def connect(
    model: nn.Module,
    a: Any,
    b: Any,
    train: Any,
    kept: float | Sequence[float] = ...,
    target: float | None = ...,
    test: Any = ...,
    subnetworks: str = ...,
    seed: int = ...,
    *,
    loss: Loss = ...,
    spec: str | None = ...,
    folder: str | os.PathLike[str] | None = ...,
    log: Log | None = ...,
) -> Connection: ...


@without_autocast
def connect(
    model: nn.Module,
    a: Any,
    b: Any = None,
    train: Any = None,
    kept: float | Sequence[float] = 0.5,
    target: float | None = None,
    test: Any = None,
    subnetworks: str = "auto",
    seed: int = 0,
    *,
    loss: Loss = "cross_entropy",
    spec: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    log: Log | None = None,
) -> Connection | Star:
    """Finds a path of low loss between networks, with a certified bound on its loss.

    Implements the construction of Nguyen, Bréchet, Mondelli 2021 ("When Are Solutions Connected in
    Deep Networks?", Theorem 4.1): a subnetwork for every entry layer, on a part of that layer's
    features; from each network down to its subnetwork on the input by rewrites of dead units and
    swings of the output layer. All networks share the subnetwork on the input: it is a hub, through
    which any number of them are connected pairwise, at a cost linear in their number. The loss is
    constant on a rewrite and convex on a swing, so its maximum over the whole path is attained at a
    breakpoint. In a residual network with batch norms the same moves are made of halves of the
    channels: a subnetwork for values on the stream and within blocks, on one half of each stage.

    Args:
        model: the architecture, a chain of layers (MLP, VGG, …) or a residual network whose blocks
            have identity or convolutional shortcuts; it is left as it was.
        a, b: the two networks: modules, state dicts or checkpoint files that fit the model. A list
            of networks as a, and no b, for a star of several chains of layers:
            `connect(model, [a, b, c], train=data)`.
        train: data that the subnetworks are trained on and the bound holds for, as for `evaluate`;
            targets are class labels, or what the loss takes.
        kept: fraction of the units of a hidden layer that its subnetwork reads, for all layers or
            for each of layers 1 … L-1; 0.5 in a residual network.
        target: the loss to get below; the work goes to the entry layers that are above it. None for
            1.05 times the larger loss of the end points, and less than that of outputs that are all
            0, in fewer rounds.
        test: other data to certify as well, on the same path.
        subnetworks: how they are found.
            "separable": scaled witnesses of linear separability, and "memorise": layers of order
            √N units that give every sample its label; both train nothing and need fully connected
            layers. "memorise" needs ReLU and gives a path in float64.
            "readout": linear readouts. "head": shallow subnetworks on fixed features. "trained":
            full-depth subnetworks, each begun from the one above it.
            "auto": where all layers are linear with an activation that carries numbers (ReLU,
            LeakyReLU, GELU, SiLU, softplus, hardswish), readouts if they reach the target, else
            heads, and closed forms that memorise if heads do not reach a target that was given;
            "trained" elsewhere, and in residual networks always.
        seed: of the kept units, the subnetworks' weights and the order of the samples.
        loss: as for `evaluate`, one that is convex in the outputs: "cross_entropy", "mse", "bce",
            or one of PyTorch's, with class weights or label smoothing (`check_convex` has the
            list). Targets are then as it takes them.
        spec: text that names the model, kept with the connection.
        folder: keeps the finished subnetworks and those in training: after an interruption the same
            call goes on from there, to the same connection. It may be removed once the connection
            is saved.
        log: called with a line of text now and then.

    Returns:
        the connection; `certificate.outcome` says whether the target is met and, if not, what makes
            the bound. A `Star` for a list of networks, whose `connection(i, j)` is that of a pair.

    Raises:
        ModeconnError: the model is neither; the networks do not fit it, or have weights that are
            not finite; the data is empty or has one class; a loss that is not convex in the
            outputs; there is no room for two subnetworks side by side; subnetworks that need
            carrying are asked of a network that cannot; features that are not separable, or that
            cannot be memorised, where that is asked; a folder that belongs to another search.
    """
    began = time.perf_counter()
    settings = Settings(kept, target, subnetworks, seed, folder, loss)
    settings.check()
    say, several = log or _silent, isinstance(a, (list, tuple))
    if several is (b is not None):
        given = "a list of networks, and b is given, too" if several else "one network, and b None"
        raise ModeconnError(f"a is {given}: expected two networks, or a list of them as a")
    if train is None:
        raise ModeconnError("train is None: expected the data that the bound is to hold for")
    if several:
        star, solution = connect_star(model, a, train, test, settings, spec, say)
        star.details = details_of(settings, solution, began)
        return star
    points, structure, made = _solved(model, {"a": a, "b": b}, train, settings, say)
    path = PolyChain([point.state for point in points])
    kinds = tuple(point.kind for point in points[1:])
    claims = Claims(kinds, [point.label for point in points], target, loss)
    both = certify_made(model, structure, path, (train, test), claims, say, folder)
    details = details_of(settings, made, began)
    return Connection(path, kinds, *both, spec, details)


def details_of(
    settings: Settings, solution: Solution | ResidualSolution, began: float
) -> dict[str, Any]:
    """Describes how subnetworks were found: plain values that JSON can hold.

    Args:
        began: the time at which it began.
    """
    kept = settings.kept
    return {
        "kept": list(kept) if isinstance(kept, Sequence) else kept,
        "target": settings.target,
        "loss": name_of(settings.loss),
        "subnetworks": settings.subnetworks,
        "seed": settings.seed,
        "seconds": round(time.perf_counter() - began, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "found": solution.records(),
    }


def _silent(line: str) -> None:
    """Ignores a line of the log."""


def _solved(
    model: nn.Module, networks: Mapping[str, Any], train: Any, settings: Settings, say: Log
) -> tuple[list[Breakpoint], Structure | LayerChain, Solution | ResidualSolution]:
    """Returns the breakpoints, the network as the verifier sees it, and the subnetworks."""
    residual = residual_network(model, train)
    if residual is None:
        solution = solve(model, networks, train, settings, say)
        return _breakpoints(solution), solution.chain, solution
    found = solve_residual(model, residual, networks, train, settings, say)
    return found.breakpoints(), _captured(model, train), found


def _captured(model: nn.Module, train: Any) -> CapturedStructure:
    """Captures the model as the verifier sees it."""
    return CapturedStructure.of(model, next(iter(as_batches(train, 4)))[0].float())


def _breakpoints(solution: Solution) -> list[Breakpoint]:
    """Builds the path through the subnetworks that were found."""
    ends = solution.ends
    of_a, of_b = solution.subnetworks("a"), solution.subnetworks("b")
    return breakpoints(solution.chain, ends["a"], of_a, ends["b"], of_b)
