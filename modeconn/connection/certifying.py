"""Certifies paths: one's own, through any network whose operations are known, and those made."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from modeconn.backends.precision import without_autocast
from modeconn.connection.certificate import Certificate
from modeconn.connection.connection import Connection
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.structure import Structure, structure_of
from modeconn.connection.verification import Claims
from modeconn.connection.verification import certify as certificate_of
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.progress import Progress, told
from modeconn.metrics.convexity import Loss
from modeconn.parameters.paths import PolyChain


@without_autocast
def certify(
    model: nn.Module,
    path: PolyChain,
    data: Any,
    *,
    test: Any = None,
    target: float | None = None,
    labels: Sequence[str] | None = None,
    loss: Loss = "cross_entropy",
    spec: str | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Connection:
    """Certifies the loss and error of a path between its breakpoints, whoever made it.

    Every segment must be a rewrite (what changes reaches the output through no non-zero weights), a
    swing (the outputs are affine in what changes, as in the last layer), or, in chains of layers, a
    shift (equal units trade outgoing weights). That is proved from the weights alone; losses and
    errors are measured at the breakpoints, in float64.

    Args:
        model: the architecture: any module whose output is one tensor [N, classes], such as
            residual networks and transformers; it is left as it was.
        path: its breakpoints are the control points.
        data: that the bound holds for, as for `evaluate`.
        test: other data to certify as well.
        target: the loss that the path should not exceed.
        labels: what each breakpoint is.
        loss: as for `evaluate`, one that is convex in the outputs.
        spec: text that names the model, kept with the connection.
        batch_size: rows at a time. progress: called with the samples done and all samples.

    Returns:
        a connection, to be saved, drawn, and checked by `verify`.

    Raises:
        ModeconnError: a segment is none of the three; the text names the node and the units. Or
            values may overflow on it, or no bound of them is known; outputs that depend on other
            rows or random numbers; a loss that is not convex; bad data.
    """
    if not isinstance(path, PolyChain):
        raise ModeconnError(
            f"path is a {type(path).__name__}: expected a PolyChain, whose segments are straight"
        )
    sample = next(iter(as_batches(data, 4)))[0][:4]
    points = path.control_points[0]
    like = next((value for value in points.values() if value.is_floating_point()), None)
    if like is not None:
        sample = sample.to(like) if sample.is_floating_point() else sample.to(like.device)
    structure = structure_of(model, sample)
    claims = Claims(None, labels, target, loss)
    made = [
        certificate_of(
            model, structure, path, each, claims, batch_size=batch_size, progress=progress
        )
        for each in (data, test)
        if each is not None
    ]
    kinds = [segment.kind for segment in made[0].segments]
    return Connection(path, tuple(kinds), made[0], (*made, None)[1], spec)


def certify_made(
    model: nn.Module,
    structure: Structure | LayerChain,
    path: PolyChain,
    data: tuple[Any, Any],
    claims: Claims,
    say: Callable[[str], None],
    folder: str | os.PathLike[str] | None,
    name: str = "certificate",
) -> tuple[Certificate, Certificate | None]:
    """Certifies a path that was made, for the training data and perhaps test data.

    Args:
        model: the architecture. structure: of it.
        path: with what is claimed of it.
        data: for training and for tests, or None.
        say: called with a line of text now and then.
        folder: keeps the sums so far, from which the same call goes on after an interruption.
        name: of the certificate: of the files, and in what is said.
    """
    found = []
    for each, what in zip(data, (name, f"{name} of test data")):
        if each is None:
            continue
        say(what)
        file = None if folder is None else Path(folder) / f"{what.replace(' ', '-')}.safetensors"
        progress = told(say, what)
        found.append(
            certificate_of(model, structure, path, each, claims, progress=progress, file=file)
        )
    return found[0], (*found, None)[1]
