"""Verification of certificates: true ones are confirmed, every tampering is found."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import certificate_cases
from certificate_cases import changed, connect, walk_of
from modeconn.connection.certificate import Certificate, FalseCertificate
from modeconn.connection.connection import Connection
from modeconn.connection.verification import certify, verify
from modeconn.data.batches import Batches
from modeconn.errors import ModeconnError
from walk import KINDS, Walk

# Fixtures.
made = certificate_cases.made


# ---------------------------------------------------------------- verify


def test_a_true_certificate_is_confirmed(made):
    w, connection = made
    found = verify(w.model, connection, w.data, a=w.points[0], b=w.points[-1])
    assert found == connection.certificate
    assert found.same_data
    assert verify(w.model, connection, Batches(lambda: iter([w.data]), 13), batch_size=13).same_data


def test_other_data_get_bounds_of_their_own(made):
    w, connection = made
    other = w.x[:20] + 0.5, w.y[:20]
    found = verify(w.model, connection, other)
    assert not found.same_data
    assert found == certify(w.model, w.chain, w.path, other)
    both = dataclasses.replace(connection, test_certificate=found)
    with pytest.raises(FalseCertificate, match=r"are those of the test certificate.*as test"):
        verify(w.model, both, other)
    again = verify(w.model, both, w.data, test=other)
    assert again.same_data
    assert again.test == found
    assert again.test.same_data
    lower = dataclasses.replace(found, bound=0.0)
    with pytest.raises(FalseCertificate, match=r"test certificate: .*bound is 0"):
        verify(w.model, dataclasses.replace(connection, test_certificate=lower), w.data)
    with pytest.raises(FalseCertificate, match="are not those that the main certificate was made"):
        verify(w.model, connection, other, require_same_data=True)


def fitted(certificate: Certificate, k: int, **changes) -> Certificate:
    """The certificate with one segment changed."""
    segments = list(certificate.segments)
    segments[k] = dataclasses.replace(segments[k], **changes)
    return dataclasses.replace(certificate, segments=tuple(segments))


def lower_loss(c: Certificate) -> Certificate:
    """Lie consistently: a lower loss at the worst breakpoint, and all that follows from it."""
    losses = list(c.losses)
    losses[c.worst] *= 0.99
    segments = [
        dataclasses.replace(s, losses=tuple(losses[k : k + 2])) for k, s in enumerate(c.segments)
    ]
    return Certificate.of(segments, c.labels, c.samples, c.digest)


def lower_error(c: Certificate) -> Certificate:
    errors = list(c.errors)
    errors[2] -= 1 / c.samples
    segments = [
        dataclasses.replace(
            s, errors=tuple(errors[k : k + 2]), max_error=max(*errors[k : k + 2], s.max_error)
        )
        for k, s in enumerate(c.segments)
    ]
    return Certificate.of(segments, c.labels, c.samples, c.digest)


def lower_peak(c: Certificate) -> Certificate:
    segments = list(c.segments)
    segments[1] = dataclasses.replace(segments[1], max_error=max(segments[1].errors))
    return Certificate.of(segments, c.labels, c.samples, c.digest)


def dropped(c: Certificate) -> Certificate:
    return Certificate.of(c.segments[:-1], c.labels[:-1], c.samples, c.digest)


LIES = {
    "bound": (lambda c: dataclasses.replace(c, bound=c.bound * 0.9), "the certificate's bound is"),
    "error bound": (
        lambda c: dataclasses.replace(c, error_bound=0.0),
        "the certificate's error bound is",
    ),
    "one loss": (
        lambda c: dataclasses.replace(c, losses=(0.0, *c.losses[1:])),
        "segment 0 says other losses",
    ),
    "a consistent loss": (lower_loss, r"the loss at breakpoint \d is said to be"),
    "a consistent error": (lower_error, "the error at breakpoint 2 is said to be"),
    "an error's peak": (lower_peak, "the largest error of segment 1 is said to be"),
    "an error below its ends": (
        lambda c: fitted(c, 1, max_error=0.0),
        "segment 1: largest error 0 is below",
    ),
    "NaN": (lambda c: dataclasses.replace(c, bound=math.nan), "bound is nan"),
    "a dropped segment": (dropped, "has 5 segments, the path 6"),
    "a dropped loss": (lambda c: dataclasses.replace(c, losses=c.losses[1:]), "6 losses, 7 errors"),
    "a kind": (lambda c: fitted(c, 1, kind="rewrite"), "segment 1 is said to be a rewrite"),
    "constant by dead units": (
        lambda c: fitted(c, 3, kind="rewrite"),
        "segment 3 is said to be a rewrite",
    ),
    "a swing of dead units": (
        lambda c: fitted(c, 0, kind="swing"),
        "segment 0 is said to be a swing",
    ),
    "what moved": (lambda c: fitted(c, 0, moved=("0.bias",)), "segment 0 is said to move 0.bias"),
    "where": (lambda c: fitted(c, 0, end=0.5), "segment 0 is said to go from t = 0 to 0.5"),
    "samples": (lambda c: dataclasses.replace(c, samples=61), "says 61 samples, the data have 60"),
}


@pytest.fixture(scope="module")
def peaked() -> tuple[Walk, Connection]:
    """A connection whose first swing has its largest error inside."""
    for seed in range(50):
        w = walk_of("relu", seed)
        connection = connect(w)
        swing = connection.certificate.segments[1]
        if swing.max_error > max(swing.errors):
            return w, connection
    raise AssertionError("no seed gives such a swing")


@pytest.mark.parametrize("lie", LIES)
def test_a_false_certificate_is_found(peaked, lie):
    w, connection = peaked
    change, message = LIES[lie]
    with pytest.raises(FalseCertificate, match=message):
        verify(
            w.model,
            dataclasses.replace(connection, certificate=change(connection.certificate)),
            w.data,
        )


def test_a_changed_digest_makes_the_data_others(peaked):
    w, connection = peaked
    certificate = dataclasses.replace(connection.certificate, digest="0" * 64)
    assert not verify(
        w.model, dataclasses.replace(connection, certificate=certificate), w.data
    ).same_data


def with_points(
    w: Walk, connection: Connection, points: list[dict[str, torch.Tensor]]
) -> Connection:
    changed = dataclasses.replace(w, points=points)
    return dataclasses.replace(connection, path=changed.path)


def test_changed_weights_are_found(made):
    w, connection = made
    # Half A of the second layer at breakpoint 1: it is live there, before the swing.
    layer = w.chain.layers[1]
    points = list(w.points)
    points[1] = changed(w, 1, layer.weight, 0, 1e-3)
    with pytest.raises(
        FalseCertificate, match=r"segment 0 .* is not certified: .*layer 2 .*1 live unit moves: 0"
    ):
        verify(w.model, with_points(w, connection, points), w.data)
    points[1] = changed(w, 1, w.chain.layers[-1].weight, 0, 1e-1)
    with pytest.raises(FalseCertificate, match=r"segment 0 .* is not certified"):
        verify(w.model, with_points(w, connection, points), w.data)
    # Everywhere alike, no segment shows it: the losses do.
    points = [changed(w, k, w.chain.layers[-1].bias, 0, 1.0) for k in range(len(w.points))]
    with pytest.raises(FalseCertificate, match="the loss at breakpoint 0 is said to be"):
        verify(w.model, with_points(w, connection, points), w.data)


def test_swapped_or_other_ends_are_found(made):
    w, connection = made
    points = [w.points[-1], *w.points[1:-1], w.points[0]]
    with pytest.raises(FalseCertificate, match="is not certified"):
        verify(w.model, with_points(w, connection, points), w.data)
    back = with_points(w, dataclasses.replace(connection, kinds=KINDS[::-1]), w.points[::-1])
    with pytest.raises(
        FalseCertificate, match="segment 0 is said to be a rewrite, and its weights say swing"
    ):
        verify(w.model, back, w.data)
    with pytest.raises(FalseCertificate, match=r"does not end in b: \d+ of \d+ parameters and "):
        verify(w.model, connection, w.data, b=w.points[0])
    zeros = {
        key: torch.where(v == 0, -v, v) if v.is_floating_point() else v
        for key, v in w.points[0].items()
    }
    with pytest.raises(FalseCertificate, match="does not end in a: "):  # equal numbers, other bits
        verify(w.model, connection, w.data, a=zeros)


def test_weights_that_became_nan_are_found(made):
    w, connection = made
    path = w.path
    path.control_points[2] = changed(w, 2, w.chain.layers[0].weight, 0, math.nan)
    with pytest.raises(FalseCertificate, match=r"breakpoint 2: weights must be finite.*NaN"):
        verify(w.model, dataclasses.replace(connection, path=path), w.data)


def test_data_that_cannot_be_read_twice(made):
    w, connection = made
    with pytest.raises(ModeconnError, match="read only once"):
        verify(w.model, connection, iter([w.data]))
