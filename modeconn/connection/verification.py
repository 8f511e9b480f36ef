"""Makes and checks certificates of paths.

A verifier trusts the breakpoints and the data, and nothing that is said about them: it classifies
every segment again from the weights, measures losses and errors again from the data, bounds what
rounding can make of them, and compares every claim.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modeconn.backends.precision import without_autocast
from modeconn.connection import claims as compared
from modeconn.connection.certificate import Certificate, FalseCertificate
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.measurement import (
    MeasuredPath,
    Measuring,
    OverflowPossible,
    Subject,
    computed_with,
    measure_path,
)
from modeconn.connection.segment_kinds import Evidence
from modeconn.connection.storage import bitwise_equal
from modeconn.connection.structure import ChainStructure, Structure, structure_of
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import check_fit
from modeconn.evaluation.progress import Progress
from modeconn.metrics.convexity import Loss, name_of
from modeconn.parameters import state as states
from modeconn.parameters.paths import PolyChain

# Multiply-adds for the bounds of rounding. Measured on the 10 × 245 MNIST network, 60,000 samples,
# two cores: a verification takes 34 s with the first, and 160 s with the second, which is what it
# takes to know something of float32.
_EFFORT, _EFFORT_TO_VERIFY = 1e11, 6e12


@dataclass(frozen=True)
class Claims:
    """Statements about a path to be certified.

    Attributes:
        kinds: of its segments; checked against what the weights say.
        labels: what each of the S + 1 breakpoints is; kept in the certificate.
        target: the loss that the path should not exceed; kept in the certificate.
        loss: as for `evaluate`, one that is convex in the outputs.
    """

    kinds: Sequence[str] | None = None
    labels: Sequence[str] | None = None
    target: float | None = None
    loss: Loss = "cross_entropy"


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
    structure: Structure | LayerChain,
    path: PolyChain,
    data: Any,
    claims: Claims | None = None,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    file: str | os.PathLike[str] | None = None,
) -> Certificate:
    """Certifies a path for one data set, by one pass over it at the breakpoints, in float64.

    Args:
        model: the architecture. structure: of it, or its layers.
        path: S segments, each a rewrite, shift or swing.
        data: as for `evaluate`.
        claims: kinds to check, labels and target to keep, the loss.
        batch_size: rows at a time; by default what fits the memory of a plain pass.
        progress: called with the samples done and all samples.
        file: keeps the sums so far, from which the same call goes on after an interruption.

    Raises:
        ModeconnError: a segment is none of the three kinds, or not of the kind given; values may
            overflow on it; a loss that is not convex in the outputs; bad data; see
            `classify_segment`.
    """
    claims = claims or Claims()
    check_fit(model, path)
    structure = ChainStructure(structure) if isinstance(structure, LayerChain) else structure
    evidence = _classified(structure, path)
    if claims.kinds is not None:
        compared.check_kinds(claims.kinds, evidence, ModeconnError)
    subject = Subject(model, structure, path, tuple(evidence))
    how = Measuring(claims.loss, batch_size, progress=progress, effort=_EFFORT, file=file)
    return measure_path(subject, data, how).certificate(claims.labels, claims.target)


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
    test: Any = None,
    target: float | None = None,
    loss: Loss = "cross_entropy",
    precision: str = "float64",
    require_same_data: bool = False,
) -> Certificate:
    """Recomputes the certificate of a connection from its breakpoints and the data, and compares.

    Every claim of the connection is compared: kinds, evidence, labels, losses, errors and their
    places, the bounds and those on rounding, of all certificates. `checked` of the result says
    what was, and what no weights or data can tell.

    Args:
        model: the architecture. connection: path and stored certificates.
        data: the data that the main certificate was made from; with other data the result holds for
            those, and has `same_data` False: stored losses are not compared then.
        batch_size: rows at a time. progress: called with the samples done and all samples.
        a, b: the networks that the path should join (modules, state dicts or files): compared
            bitwise with its ends.
        test: the data of the connection's certificate of other data.
        target: the loss that you ask for. The stored one is a claim, and is not used.
        loss: as for `evaluate`: the one that was certified.
        precision: of the computation, "float64" or "float32".
        require_same_data: whether to raise where the data are not those of the main certificate.

    Returns:
        the recomputed certificate, with the target given and the labels that the weights bear out.

    Raises:
        FalseCertificate: says what is false. Data of the test certificate alone are refused, too:
            they are never taken for those of the main one.
        ModeconnError: bad data, a loss that is not convex in the outputs, or a model that does not
            fit the path.
    """
    path = connection.path
    stored = {"certificate": connection.certificate}
    if connection.test_certificate is not None:
        stored["test certificate"] = connection.test_certificate
    _check_weights(path)
    _check_ends(path, a, b)
    for certificate in stored.values():
        _check_loss(certificate, loss)
    subject = _subject(model, path, data)
    checked = _check_structure(connection, stored, subject, target)
    how = Measuring(loss, batch_size, precision, progress, _EFFORT_TO_VERIFY)
    measured = _measured(subject, data, how)
    found, said = _compared(connection.certificate, measured, subject, target)
    if not found.same_data:
        _refuse_other_data(found, connection, require_same_data)
    checked += [f"main certificate: {said}"]
    if test is not None:
        other, said = _compared(
            connection.test_certificate, _measured(subject, test, how), subject, target
        )
        if not other.same_data and other.digest == connection.certificate.digest:
            raise FalseCertificate("test: these are the data of the main certificate")
        found = replace(found, test=other)
        checked += [f"test certificate: {said}"]
    elif connection.test_certificate is not None:
        checked += ["test certificate: its numbers were not compared; give its data as test"]
    return replace(found, checked=tuple(checked))


def _subject(model: nn.Module, path: PolyChain, data: Any) -> Subject:
    """Finds the model's structure and proves the segments' kinds."""
    structure = _structure_of(model, path, data)
    return Subject(model, structure, path, tuple(_proven(structure, path)))


def _measured(subject: Subject, data: Any, how: Measuring) -> MeasuredPath:
    try:
        return measure_path(subject, data, how)
    except OverflowPossible as error:
        raise FalseCertificate(str(error)) from error


def _check_structure(
    connection: Certified,
    stored: Mapping[str, Certificate],
    subject: Subject,
    target: float | None,
) -> list[str]:
    """Compares what the weights alone can tell; returns what was checked."""
    compared.check_kinds(connection.kinds, subject.evidence, FalseCertificate)
    chain = _chain_of(subject)
    lines = ["kinds, moved tensors, evidence and ends of all segments: from the weights"]
    for name, certificate in stored.items():
        try:
            compared.check_structure(certificate, subject.evidence)
            unknown = compared.checked_labels(certificate.labels, subject.path, chain)[1]
        except FalseCertificate as error:
            if name == "certificate":
                raise
            raise FalseCertificate(f"{name}: {error}") from error
        if unknown:
            lines.append(f"labels of the {name}: not checked, such as {unknown[0]!r}")
    details = getattr(connection, "details", {})
    lines.append(compared.check_target(list(stored.values()), details, target))
    lines.append(compared.check_model(getattr(connection, "model", None), subject.path))
    if details:
        lines.append("details: how it was made is told by who made it, and proves nothing")
    return lines


def _compared(
    stored: Certificate | None, measured: MeasuredPath, subject: Subject, target: float | None
) -> tuple[Certificate, str]:
    """Returns the certificate that was measured, and what was compared with the stored one."""
    own = measured.certificate(None, target)
    if stored is None:
        return replace(own, same_data=False), "none is stored"
    labels, _ = compared.checked_labels(stored.labels, subject.path, _chain_of(subject))
    own = replace(own, labels=labels)
    if stored.digest != own.digest:
        return replace(own, same_data=False), "OTHER DATA: nothing stored was compared"
    compared.check_numbers(stored, own, measured)
    if stored.rounding is None and own.rounding is not None:
        return own, "an earlier one, of float32: its numbers are true to that rounding"
    return own, "all losses, errors, their places and the bounds on rounding: from the data"


def _refuse_other_data(found: Certificate, connection: Certified, required: bool) -> None:
    """Raises where data that are not the main certificate's cannot be taken."""
    other = connection.test_certificate
    if other is not None and other.digest == found.digest:
        raise FalseCertificate(
            "the data are those of the test certificate, and the main certificate is of others: "
            "give the data of the main certificate, and these as test; if they are the main "
            "certificate's, the two were swapped"
        )
    if required:
        raise FalseCertificate(
            "the data are not those that the main certificate was made from "
            f"(digest {found.digest[:12]}…, stored {connection.certificate.digest[:12]}…)"
        )


def _chain_of(subject: Subject) -> LayerChain | None:
    structure = subject.structure
    return structure.chain if isinstance(structure, ChainStructure) else None


def _check_loss(certificate: Certificate, loss: Loss) -> None:
    if certificate.loss != name_of(loss):
        raise FalseCertificate(
            f"the certificate is of the loss {certificate.loss}, and you verify {name_of(loss)}: "
            "give the same one as loss"
        )


# -- checks of the weights -------------------------------------------------------------------------


def _classified(structure: Structure, path: PolyChain) -> list[Evidence]:
    """Classifies every segment from its weights.

    Raises:
        ModeconnError: says which segment is not certified, and why.
    """
    evidence = []
    for k in range(path.segments):
        try:
            found = structure.classify(path.control_points[k], path.control_points[k + 1])
        except ModeconnError as error:
            raise ModeconnError(
                f"segment {k} (of 0 to {path.segments - 1}) is not certified: {error}"
            ) from error
        evidence.append(found)
    return evidence


def _proven(structure: Structure, path: PolyChain) -> list[Evidence]:
    """Classifies every segment of a path that is said to be certified."""
    try:
        return _classified(structure, path)
    except ModeconnError as error:
        raise FalseCertificate(str(error)) from error


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
            _check_end(name, _widened(states.load(given), point), point)


def _widened(given: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Casts floats to a wider dtype of the path, which is exact: memorising paths are float64."""
    widened = dict(given)
    for key, value in given.items():
        wide = point[key].dtype if key in point else value.dtype
        if value.is_floating_point() and torch.promote_types(value.dtype, wide) == wide:
            widened[key] = value.to(wide)
    return widened


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


def _structure_of(model: nn.Module, path: PolyChain, data: Any) -> Structure:
    """Finds the model's structure from the first rows of data, which must be readable once more."""
    check_fit(model, path)
    if hasattr(data, "__next__"):
        raise ModeconnError(
            "data is an iterator, which can be read only once: "
            "expected something that can be read again"
        )
    first = next(iter(as_batches(data, 4)))[0]
    return structure_of(model, computed_with(first[:4], path))
