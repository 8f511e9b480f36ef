"""Makes and checks certificates of paths.

A verifier trusts the breakpoints and the data, and nothing that is said about them: it classifies
every segment again from the weights, and measures losses and errors again from the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.connection.certificate import Certificate, FalseCertificate
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.measurement import Subject, computed_with, measure_path
from modeconn.connection.segment_kinds import Evidence, classify_segment
from modeconn.connection.storage import bitwise_equal
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import check_fit
from modeconn.evaluation.progress import Progress
from modeconn.parameters import state as states
from modeconn.parameters.paths import PolyChain

# Recomputed numbers may differ from stored ones by this much: other machines and libraries add up
# in another order, which moves a loss in its last digits, and a few samples whose two largest
# logits tie to rounding.
LOSS_TOLERANCE = 1e-4  # relative
SMALLEST_LOSS = 1e-6  # below it differences are measured against this
ERROR_TOLERANCE = 1e-4  # fraction of the samples
_T_TOLERANCE = 1e-12  # of t at the ends of a segment, which are quotients of small integers


@dataclass(frozen=True)
class Claims:
    """Statements about a path to be certified.

    Attributes:
        kinds: of its segments; checked against what the weights say.
        labels: what each of the S + 1 breakpoints is; kept in the certificate.
        target: the loss that the path should not exceed; kept in the certificate.
    """

    kinds: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    target: float | None = None


class Certified(Protocol):
    """A path with its certificates, as `verify` reads it: a `Connection`, say."""

    @property
    def path(self) -> PolyChain:
        """The breakpoints."""

    @property
    def kinds(self) -> Sequence[str]:
        """The kind that each segment is said to have."""

    @property
    def certificate(self) -> Certificate:
        """Bounds for the training data."""

    @property
    def test_certificate(self) -> Certificate | None:
        """Bounds for other data."""


def certify(
    model: nn.Module,
    chain: LayerChain,
    path: PolyChain,
    data: Any,
    claims: Claims | None = None,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Certifies a path for one data set, by one pass over it at the breakpoints.

    Args:
        model: the architecture. chain: its layers.
        path: S segments, each a rewrite, shift or swing.
        data: as for `evaluate`, with class labels.
        claims: kinds to check, labels and target to keep.
        batch_size: rows at a time; by default what fits the memory of a plain pass.
        progress: called with the samples done and all samples.

    Raises:
        ModeconnError: a segment is none of the three kinds, or not of the kind given; bad data; see
            `classify_segment`.
    """
    claims = claims or Claims()
    check_fit(model, path)
    evidence = _classified(chain, path)
    if claims.kinds is not None:
        _check_kinds(claims.kinds, evidence, ModeconnError)
    subject = Subject(model, chain, path, tuple(evidence))
    measured = measure_path(subject, data, batch_size, progress)
    return measured.certificate(claims.labels, claims.target)


@without_autocast
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
    """Recomputes the certificate of a connection from its breakpoints and the data, and compares.

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
    path = connection.path
    stored = [connection.certificate]
    if connection.test_certificate is not None:
        stored.append(connection.test_certificate)
    _check_weights(path)
    _check_ends(path, a, b)
    for certificate in stored:
        _check_own_numbers(certificate, path)
    chain = _chain_of(model, path, data)
    evidence = _proven(chain, path)
    _check_kinds(connection.kinds, evidence, FalseCertificate)
    for certificate in stored:
        _check_kinds([segment.kind for segment in certificate.segments], evidence, FalseCertificate)
        _check_segments(certificate, evidence)
    subject = Subject(model, chain, path, tuple(evidence))
    measured = measure_path(subject, data, batch_size, progress)
    found = measured.certificate(stored[0].labels, stored[0].target)
    same = [certificate for certificate in stored if certificate.digest == found.digest]
    for certificate in same:
        _compare(certificate, found)
    if not same:
        return replace(found, same_data=False)
    return replace(found, target=same[0].target, labels=same[0].labels)


# -- checks of the weights -------------------------------------------------------------------------


def _classified(chain: LayerChain, path: PolyChain) -> list[Evidence]:
    """Classifies every segment from its weights.

    Raises:
        ModeconnError: says which segment is not certified, and why.
    """
    evidence = []
    for k in range(path.segments):
        try:
            found = classify_segment(chain, path.control_points[k], path.control_points[k + 1])
        except ModeconnError as error:
            raise ModeconnError(
                f"segment {k} (of 0 to {path.segments - 1}) is not certified: {error}"
            ) from error
        evidence.append(found)
    return evidence


def _proven(chain: LayerChain, path: PolyChain) -> list[Evidence]:
    """Classifies every segment of a path that is said to be certified."""
    try:
        return _classified(chain, path)
    except ModeconnError as error:
        raise FalseCertificate(str(error)) from error


def _check_kinds(
    kinds: Sequence[str], evidence: Sequence[Evidence], error: type[ModeconnError]
) -> None:
    """Raises where the weights of a segment do not bear out the kind that it is said to have."""
    if len(kinds) != len(evidence):
        raise error(
            f"kinds: got {len(kinds)}, expected one for each of the {len(evidence)} segments"
        )
    for k, (kind, found) in enumerate(zip(kinds, evidence)):
        if not found.supports(kind):
            raise error(
                f"segment {k} is said to be a {kind}, "
                f"and its weights say {found.kind}: {found.text}"
            )


def _check_segments(certificate: Certificate, evidence: Sequence[Evidence]) -> None:
    """Raises where a certificate names other moved tensors or other positions of a segment."""
    count = len(evidence)
    for k, (segment, found) in enumerate(zip(certificate.segments, evidence)):
        if set(segment.moved) != set(found.moved):
            raise FalseCertificate(
                f"segment {k} is said to move {', '.join(segment.moved) or 'nothing'}; "
                f"it moves {', '.join(found.moved)}"
            )
        start, end = k / count, (k + 1) / count
        if abs(segment.start - start) > _T_TOLERANCE or abs(segment.end - end) > _T_TOLERANCE:
            raise FalseCertificate(
                f"segment {k} is said to go from t = {segment.start:.6g} to {segment.end:.6g}; "
                f"it goes from {start:.6g} to {end:.6g}"
            )


def _check_weights(path: PolyChain) -> None:
    """Raises where a breakpoint's weights are not finite, or do not fit the others'."""
    names = [f"breakpoint {k}" for k in range(len(path.control_points))]
    try:
        for point, name in zip(path.control_points, names):
            states.check(point, name)
        states.match(path.control_points, names)
    except ModeconnError as error:
        raise FalseCertificate(str(error)) from error


def _check_ends(path: PolyChain, a: Any, b: Any) -> None:
    """Raises where the path does not begin in network a or end in b, bit for bit."""
    for name, given, point in (("a", a, path.control_points[0]), ("b", b, path.control_points[-1])):
        if given is not None:
            _check_end(name, states.load(given), point)


def _check_end(name: str, given: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> None:
    states.match([given, point], [name, "the path's end point"], devices=False)
    different = []
    for key, value in given.items():
        if not bitwise_equal(value.cpu(), point[key].cpu()):
            different.append(key)
    if different:
        raise FalseCertificate(
            f"the path does not end in {name}: {len(different)} of {len(given)} "
            f"parameters and buffers differ, first {different[0]}"
        )


def _check_own_numbers(certificate: Certificate, path: PolyChain) -> None:
    certificate.check_own_numbers()
    if len(certificate.segments) != path.segments:
        raise FalseCertificate(
            f"the certificate has {len(certificate.segments)} segments, the path {path.segments}"
        )


def _chain_of(model: nn.Module, path: PolyChain, data: Any) -> LayerChain:
    """Finds the model's layers from the first rows of data, which must be readable once more."""
    check_fit(model, path)
    if hasattr(data, "__next__"):
        raise ModeconnError(
            "data is an iterator, which can be read only once: "
            "expected something that can be read again"
        )
    first = next(iter(as_batches(data, 4)))[0]
    return LayerChain.of(model, computed_with(first[:4], path))


# -- comparison with stored numbers ----------------------------------------------------------------


def _compare(stored: Certificate, found: Certificate) -> None:
    """Raises where stored losses or errors are not those that were found, up to rounding."""
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
                f"the largest error of segment {k} is said to be {one.max_error:.8g}, "
                f"and is {other.max_error:.8g}"
            )


def _close(a: float, b: float, allowed: float) -> bool:
    return a == b or abs(a - b) <= allowed or (math.isnan(a) and math.isnan(b))
