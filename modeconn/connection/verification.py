"""Certificates made and checked: one pass over the data, at the breakpoints alone, and the structure from the weights.

A verifier trusts the breakpoints and the data, and nothing that is said about them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.connection.certificate import Certificate, FalseCertificate, Segment
from modeconn.connection.chain import Chain, block_rows
from modeconn.connection.storage import bitwise_equal
from modeconn.connection.structure import SWING, Evidence, structure
from modeconn.connection.swing import Steps, SwingError, correct
from modeconn.data.batches import Batches, as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import check_fit, positive
from modeconn.evaluation.outputs import Forward
from modeconn.evaluation.progress import Progress
from modeconn.metrics import Head
from modeconn.parameters import state as states
from modeconn.parameters.paths import PolyChain

# How far recomputed numbers may be from stored ones: other machines and libraries add up in another
# order, which moves a loss in its last digits, and a few samples whose two largest logits tie to
# rounding.
LOSS_TOLERANCE = 1e-4
SMALLEST_LOSS = 1e-6  # below it differences are measured against this
ERROR_TOLERANCE = 1e-4  # fraction of the samples
# Rows that go through every breakpoint by a plain pass, too.
_PLAIN_ROWS = 16


class Certified(Protocol):
    """What is verified: a `Connection`, say."""

    @property
    def path(self) -> PolyChain:
        """The breakpoints."""

    @property
    def kinds(self) -> Sequence[str]:
        """What each segment is said to be."""

    @property
    def certificate(self) -> Certificate:
        """What is said of the training data."""

    @property
    def test_certificate(self) -> Certificate | None:
        """What is said of other data."""


def certify(
    model: nn.Module,
    chain: Chain,
    path: PolyChain,
    data: Any,
    kinds: Sequence[str] | None = None,
    target: float | None = None,
    labels: Sequence[str] | None = None,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """The certificate of a path for one data set, from one pass over it at the breakpoints.

    Args:
        model: the architecture. chain: what it is.
        path: S segments, each a rewrite, shift or swing.
        data: whatever `evaluate` takes, with class labels.
        kinds: what each segment is meant to be, checked against what its weights say.
        target: the loss that the path should not exceed, kept in the certificate.
        labels: what each of the S + 1 breakpoints is.
        batch_size: rows at a time; by default what fits the memory of a plain pass.
        progress: called with the samples done and all samples.

    Raises:
        ModeconnError: a segment is none of the three kinds, or not of the kind given; bad data; see
            `structure`.
    """
    check_fit(model, path)
    evidence = _structures(chain, path)
    if kinds is not None:
        _check_kinds(kinds, evidence, ModeconnError)
    return _certificate(model, chain, path, data, evidence, target, labels, batch_size, progress)


def verify(
    model: nn.Module,
    connection: Certified,
    data: Any,
    batch_size: int | None = None,
    progress: Progress | None = None,
    *,
    a: Any = None,
    b: Any = None,
) -> Certificate:
    """Recompute the certificate of a connection from its breakpoints and the data, and compare.

    Args:
        model: the architecture. connection: path and stored certificates.
        data: the data that one of the stored certificates was made from; with other data the result
            holds for those, and has `same_data` False: stored losses cannot be compared then.
        batch_size: rows at a time. progress: called with the samples done and all samples.
        a, b: the networks that the path should join (modules, state dicts or files): compared
            bitwise with its ends.

    Returns:
        the recomputed certificate, with the stored target and labels.

    Raises:
        FalseCertificate: says what is false.
        ModeconnError: bad data, or a model that does not fit the path.
    """
    path, stored = (
        connection.path,
        [c for c in (connection.certificate, connection.test_certificate) if c is not None],
    )
    _check_weights(path)
    for name, given, point in (("a", a, path.control_points[0]), ("b", b, path.control_points[-1])):
        if given is not None:
            _check_end(name, states.load(given), point)
    for certificate in stored:
        certificate.check_own_numbers()
        if len(certificate.segments) != path.segments:
            raise FalseCertificate(
                f"the certificate has {len(certificate.segments)} segments, the path {path.segments}"
            )
    chain, batches = _prepare(model, path, data, batch_size)
    try:
        evidence = _structures(chain, path)
    except ModeconnError as error:
        raise FalseCertificate(str(error)) from error
    _check_kinds(connection.kinds, evidence, FalseCertificate)
    for certificate in stored:
        _check_kinds([segment.kind for segment in certificate.segments], evidence, FalseCertificate)
        _check_segments(certificate, evidence)
    main = stored[0]
    found = _certificate(
        model, chain, path, batches, evidence, main.target, main.labels, batch_size, progress
    )
    same = [certificate for certificate in stored if certificate.digest == found.digest]
    for certificate in same:
        _compare(certificate, found)
    if not same:
        return replace(found, same_data=False)
    return replace(found, target=same[0].target, labels=same[0].labels)


# ------------------------------------------------------------------------------------------------
# structure


def _structures(chain: Chain, path: PolyChain) -> list[Evidence]:
    """What every segment is.

    Raises:
        ModeconnError: says which segment is not certified, and why.
    """
    return [_structure(chain, path, k) for k in range(path.segments)]


def _structure(chain: Chain, path: PolyChain, k: int) -> Evidence:
    try:
        return structure(chain, path.control_points[k], path.control_points[k + 1])
    except ModeconnError as error:
        raise ModeconnError(
            f"segment {k} (of 0 to {path.segments - 1}) is not certified: {error}"
        ) from error


def _check_kinds(
    kinds: Sequence[str], evidence: Sequence[Evidence], error: type[ModeconnError]
) -> None:
    if len(kinds) != len(evidence):
        raise error(
            f"kinds: got {len(kinds)}, expected one for each of the {len(evidence)} segments"
        )
    for k, (kind, found) in enumerate(zip(kinds, evidence)):
        if not found.supports(kind):
            raise error(
                f"segment {k} is said to be a {kind}, and its weights say {found.kind}: {found.text}"
            )


def _check_segments(certificate: Certificate, evidence: Sequence[Evidence]) -> None:
    count = len(evidence)
    for k, (segment, found) in enumerate(zip(certificate.segments, evidence)):
        if set(segment.moved) != set(found.moved):
            raise FalseCertificate(
                f"segment {k} is said to move {', '.join(segment.moved) or 'nothing'}; it moves {', '.join(found.moved)}"
            )
        if abs(segment.start - k / count) > 1e-12 or abs(segment.end - (k + 1) / count) > 1e-12:
            raise FalseCertificate(
                f"segment {k} is said to go from t = {segment.start:.6g} to {segment.end:.6g}; "
                f"it goes from {k / count:.6g} to {(k + 1) / count:.6g}"
            )


def _check_weights(path: PolyChain) -> None:
    names = [f"breakpoint {k}" for k in range(len(path.control_points))]
    try:
        for point, name in zip(path.control_points, names):
            states.check(point, name)
        states.match(path.control_points, names)
    except ModeconnError as error:
        raise FalseCertificate(str(error)) from error


def _check_end(name: str, given: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> None:
    states.match([given, point], [name, "the path's end point"], devices=False)
    different = [
        key for key, value in given.items() if not bitwise_equal(value.cpu(), point[key].cpu())
    ]
    if different:
        raise FalseCertificate(
            f"the path does not end in {name}: {len(different)} of {len(given)} entries differ, first {different[0]}"
        )


# -----------------------------------------------------------------------------------------------------
# pass


def _precision(path: PolyChain) -> tuple[str, torch.dtype]:
    double = any(value.dtype == torch.float64 for value in path.control_points[0].values())
    return ("float64", torch.float64) if double else ("float32", torch.float32)


def _computed_with(inputs: Tensor, path: PolyChain) -> Tensor:
    """Inputs in the dtype and on the device of the computation."""
    device = next(iter(path.control_points[0].values())).device
    return inputs.to(device, _precision(path)[1] if inputs.is_floating_point() else None)


def _prepare(
    model: nn.Module, path: PolyChain, data: Any, batch_size: int | None
) -> tuple[Chain, Any]:
    """The model's chain, from the first rows of the data, and data that can still be read from the start."""
    check_fit(model, path)
    if hasattr(data, "__next__"):
        raise ModeconnError(
            "data: an iterator can be read only once; expected something that can be read again"
        )
    first = next(iter(as_batches(data, 4)))[0]
    return Chain.of(model, _computed_with(first[:4], path)), data


class _Digest:
    """SHA-256 of inputs and targets, row after row, whatever the batches."""

    def __init__(self) -> None:
        self._parts = [hashlib.sha256(), hashlib.sha256()]
        self._kinds = ["", ""]
        self._rows = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        self._rows += len(inputs)
        for i, tensor in enumerate((inputs, targets)):
            self._kinds[i] = f"{list(tensor.shape[1:])} {tensor.dtype}"
            self._parts[i].update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)

    def finish(self) -> str:
        text = " ".join(
            [str(self._rows), *self._kinds, *(part.hexdigest() for part in self._parts)]
        )
        return hashlib.sha256(text.encode()).hexdigest()


def _certificate(
    model: nn.Module,
    chain: Chain,
    path: PolyChain,
    data: Any,
    evidence: Sequence[Evidence],
    target: float | None,
    labels: Sequence[str] | None,
    batch_size: int | None,
    progress: Progress | None,
) -> Certificate:
    """One pass: losses and errors at the breakpoints, the exact errors of the swings, and the data's digest."""
    points = path.segments + 1
    swings = {k: SwingError() for k, found in enumerate(evidence) if found.kind == SWING}
    head, digest, sums = Head("cross_entropy", ("loss",)), _Digest(), np.zeros((points, 2))
    batches = as_batches(data, positive("batch_size", batch_size) or _rows(chain, path, data))
    forward: Forward | None = None
    samples = 0
    for inputs, targets in batches:
        x = _computed_with(inputs, path)
        if forward is None:
            forward = Forward(model, path, points, x, precision=_precision(path)[0])
            _check_engine(chain, path, x[:_PLAIN_ROWS], forward(x[:_PLAIN_ROWS]))
        logits = forward(x).double()
        y = head.fit(logits[0], targets.to(logits.device))
        digest.add(x, y)
        right = torch.stack([correct(row, y) for row in logits])
        sums[:, 0] += [float(head.sums(row, y)[0]) for row in logits]
        sums[:, 1] += (~right).sum(1).cpu().numpy()
        for k, swing in swings.items():
            swing.add(logits[k], logits[k + 1], y)
        samples += len(x)
        if progress is not None:
            progress(samples, batches.samples)
    losses, errors = (sums / samples).T.tolist()
    segments = [
        _segment(
            k,
            path.segments,
            evidence[k],
            losses,
            errors,
            swings[k].finish() if k in swings else None,
        )
        for k in range(path.segments)
    ]
    return Certificate.of(segments, labels, samples, digest.finish(), target)


def _check_engine(chain: Chain, path: PolyChain, x: Tensor, outputs: Tensor) -> None:
    """Raise where a plain pass of a few rows says otherwise: the engine leaves out dead units and sees none overflow."""
    for k, (state, own) in enumerate(zip(path.control_points, outputs)):
        plain = chain.run(state, x)
        finite = own.isfinite().all(1)
        scale = float(own[finite].abs().max()) if bool(finite.any()) else 0.0
        if not torch.allclose(plain[finite], own[finite], rtol=1e-3, atol=1e-3 * scale):
            raise ModeconnError(
                f"breakpoint {k}: a plain pass gives other outputs than the engine, which leaves out units that are not read: "
                "look for weights so large that such units overflow"
            )


def _segment(
    k: int,
    count: int,
    found: Evidence,
    losses: Sequence[float],
    errors: Sequence[float],
    steps: Steps | None,
) -> Segment:
    start, end = k / count, (k + 1) / count
    highest = max(errors[k], errors[k + 1])
    where = start if errors[k] >= errors[k + 1] else end
    if steps is not None and steps.maximum > highest:
        highest, where = steps.maximum, start + steps.argmax / count
    ends = (losses[k], losses[k + 1]), (errors[k], errors[k + 1])
    return Segment(found.kind, start, end, found.moved, *ends, highest, where, found.text)


def _rows(chain: Chain, path: PolyChain, data: Any) -> int:
    """Rows at a time: those of a plain pass, so few that the logits of all breakpoints fit in as much memory."""
    if isinstance(data, Batches):
        return data.batch_size
    first = next(iter(as_batches(data, 2)))[0]
    return max(
        16,
        min(
            block_rows(chain, _computed_with(first, path)),
            (64 << 20) // (16 * (path.segments + 1) * chain.classes),
        ),
    )


# -----------------------------------------------------------------------------------------------
# comparison


def _compare(stored: Certificate, found: Certificate) -> None:
    if stored.samples != found.samples:
        raise FalseCertificate(
            f"the certificate says {stored.samples:,} samples, the data have {found.samples:,}"
        )
    for k, (said, own) in enumerate(zip(stored.losses, found.losses)):
        if not _close(said, own, LOSS_TOLERANCE * max(abs(own), SMALLEST_LOSS)):
            raise FalseCertificate(
                f"the loss at breakpoint {k} is said to be {said:.8g}, and is {own:.8g}"
            )
    allowed = math.floor(ERROR_TOLERANCE * found.samples) / found.samples + 1e-12
    for k, (said, own) in enumerate(zip(stored.errors, found.errors)):
        if not _close(said, own, allowed):
            raise FalseCertificate(
                f"the error at breakpoint {k} is said to be {said:.8g}, and is {own:.8g}"
            )
    for k, (one, other) in enumerate(zip(stored.segments, found.segments)):
        if not _close(one.max_error, other.max_error, allowed):
            raise FalseCertificate(
                f"the largest error of segment {k} is said to be {one.max_error:.8g}, and is {other.max_error:.8g}"
            )


def _close(a: float, b: float, allowed: float) -> bool:
    return a == b or abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b))
