"""Certificates: bounds against dense sampling, outcomes, and files."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import certificate_cases
from certificate_cases import walk_of
from modeconn.connection.certificate import Certificate, Outcome, Segment
from modeconn.connection.json_values import plain
from modeconn.connection.verification import Claims, certify
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from naive import pass_per_point
from policy import assert_within_policy
from walk import KINDS

# Fixtures.
made = certificate_cases.made


# ---------------------------------------------------------------- bounds


def test_numbers_at_breakpoints_agree_with_plain_passes(made):
    w, connection = made
    certificate = connection.certificate
    assert tuple(segment.kind for segment in certificate.segments) == KINDS == connection.kinds
    t = connection.breakpoints
    plain_pass, exact = (
        pass_per_point(w.model, w.path, *w.data, t, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy(
        "losses", certificate.losses, plain_pass["loss"], exact["loss"], torch.float32
    )
    np.testing.assert_allclose(certificate.errors, plain_pass["error"], atol=1e-12)
    assert certificate.bound == max(certificate.losses)
    assert certificate.samples == len(w.y)


@pytest.mark.parametrize("kind", ["relu", "conv", "tanh"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nothing_on_the_path_exceeds_the_bounds(kind, seed):
    w = walk_of(kind, seed, torch.float64)
    certificate = certify(w.model, w.chain, w.path, w.data)
    t = np.random.default_rng(seed).random(300)
    sampled = pass_per_point(w.model, w.path, *w.data, t, torch.float64)
    assert sampled["loss"].max() <= certificate.bound * (1 + 1e-12)
    assert sampled["error"].max() <= certificate.error_bound + 1e-12
    for k, segment in enumerate(certificate.segments):
        inside = (t >= segment.start) & (t <= segment.end)
        assert sampled["loss"][inside].max() <= max(segment.losses) * (1 + 1e-12), k
        assert sampled["error"][inside].max() <= segment.max_error + 1e-12, k
        at = pass_per_point(
            w.model, w.path, *w.data, np.array([segment.max_error_at]), torch.float64
        )
        assert at["error"][0] == pytest.approx(segment.max_error, abs=1e-12), k


def test_the_error_inside_a_swing_can_exceed_both_ends():
    """Or the exact error would need no closed form: with these seeds it does."""
    rises = 0
    for seed in range(6):
        w = walk_of("relu", seed)
        rises += sum(
            s.max_error > max(s.errors) for s in certify(w.model, w.chain, w.path, w.data).segments
        )
    assert rises > 0


def test_one_pass_whatever_the_batches(made):
    w, connection = made
    certificates = []
    for size in (1, 7, 60, 1000):
        batches = as_batches(w.data, size)
        certificates.append(certify(w.model, w.chain, w.path, batches))
        assert batches.passes == 1
    for certificate in certificates:
        np.testing.assert_allclose(certificate.losses, connection.certificate.losses, rtol=1e-5)
        assert certificate.errors == connection.certificate.errors
        assert certificate.digest == connection.certificate.digest
    calls = []
    certify(
        w.model, w.chain, w.path, w.data, batch_size=25, progress=lambda *done: calls.append(done)
    )
    assert calls == [(25, 60), (50, 60), (60, 60)]


def test_the_digest_is_of_the_data(made):
    w, connection = made
    digest = connection.certificate.digest

    def of(x, y):
        return certify(w.model, w.chain, w.path, (x, y)).digest

    assert of(w.x.numpy(), w.y.int()) == digest  # computed with the same numbers
    assert of(w.x.double(), w.y) == digest
    assert of(w.x.flip(0), w.y.flip(0)) != digest
    assert of(w.x, (w.y + 1) % w.chain.classes) != digest
    assert of(w.x + 1e-6, w.y) != digest
    assert of(w.x[:-1], w.y[:-1]) != digest


def test_meant_kinds_are_checked():
    w = walk_of("relu")
    assert certify(w.model, w.chain, w.path, w.data, Claims(kinds=KINDS))
    wrong = ["rewrite"] * len(KINDS)
    with pytest.raises(
        ModeconnError, match="segment 1 is said to be a rewrite, and its weights say swing"
    ):
        certify(w.model, w.chain, w.path, w.data, Claims(kinds=wrong))
    with pytest.raises(ModeconnError, match="got 2, expected one for each of the 6 segments"):
        certify(w.model, w.chain, w.path, w.data, Claims(kinds=wrong[:2]))


def test_a_straight_line_is_not_certified():
    w = walk_of("conv")
    w = dataclasses.replace(w, points=[w.points[0], w.points[-1]])
    with pytest.raises(
        ModeconnError, match=r"segment 0 \(of 0 to 0\) is not certified: .*live units move: "
    ):
        certify(w.model, w.chain, w.path, w.data)


# ---------------------------------------------------------------- outcomes and files


def certificate_of(losses: list[float], target: float | None = None) -> Certificate:
    segments = [
        Segment("swing", k, k + 1, ("w",), (losses[k], losses[k + 1]), (0.0, 0.0), 0.0, k, "")
        for k in range(len(losses) - 1)
    ]
    return Certificate.of(segments, None, 10, "", target)


@pytest.mark.parametrize(
    ("losses", "target", "outcome", "worst"),
    [
        ([1, 3, 2], None, Outcome.CERTIFIED, 1),
        ([1, 3, 2], 3.0, Outcome.CERTIFIED, 1),
        ([1, 3, 2], 2.9, Outcome.SUBNETWORK, 1),
        ([1, 1, 2], None, Outcome.ENDS, 2),
        ([3, 3, 2], 3.5, Outcome.ENDS, 0),
        ([1, 1, 2], 1.5, Outcome.ABOVE_ENDS, 2),
        ([1, math.nan, 2], None, Outcome.UNDECIDED, 1),
        ([1, math.inf, 2], 5.0, Outcome.UNDECIDED, 1),
    ],
)
def test_outcomes_name_what_makes_the_bound(losses, target, outcome, worst):
    certificate = certificate_of([float(v) for v in losses], target)
    assert (certificate.outcome, certificate.worst) == (outcome, worst)
    label = ["a", "breakpoint 1", "b"][worst]
    assert certificate.advice.startswith(outcome.value)
    assert f"at breakpoint {worst} ({label})" in certificate.advice
    assert (
        (f"target {target:.4g}" in certificate.advice)
        if target
        else ("target" not in certificate.advice)
    )
    (row,) = [line for line in str(certificate).splitlines() if line.endswith("<- bound")]
    assert label in row


def test_weights_so_large_that_values_may_overflow_are_refused():
    w = walk_of("relu")
    large = [
        point | {key: point[key] * 1e37 for key in ("4.weight", "6.weight")} for point in w.points
    ]
    w = dataclasses.replace(w, points=large)
    with pytest.raises(ModeconnError, match=r"segment 0 .*values of layer 4 .* may reach .*e\+7"):
        certify(w.model, w.chain, w.path, w.data)
    for point in w.points:  # float64 holds them
        point |= {key: value.double() for key, value in point.items()}
    certificate = certify(w.model, w.chain, w.path, w.data)
    assert math.isinf(certificate.rounding.loss_float32)
    assert certificate.rounding.loss_float64 < 1e-9 * certificate.bound


def test_a_certificate_survives_json(made):
    _, connection = made
    certificate = connection.certificate
    assert (
        Certificate.from_dict(json.loads(json.dumps(certificate.to_dict(), allow_nan=False)))
        == certificate
    )
    odd = certificate_of([1.0, math.nan, math.inf])
    again = Certificate.from_dict(json.loads(json.dumps(odd.to_dict(), allow_nan=False)))
    assert str(again) == str(odd)
    assert math.isnan(again.bound)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "modeconn.Certificate/3"}, "format 'modeconn.Certificate/3'"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": "60"}, "samples is '60'"),
        ({"bound": "big"}, "'big' is no number"),
        ({"bound": None}, "None is no number"),
        ({"losses": [1.0]}, "a list of 7 values was expected, got 1"),
        ({"labels": 3}, "got int"),
        ({"digest": 5}, "5 is no text"),
        ({"segments": []}, "segments are 0"),
        ({"segments": [{}]}, "KeyError: 'kind'"),
        ({"segments": [{"kind": "jump"}]}, "segment kind 'jump'"),
        ({"segments": [{"power": 1}]}, "power"),
    ],
)
def test_what_is_no_certificate(made, change, message):
    content = made[1].certificate.to_dict() | change
    if "segments" in change:
        content |= {
            name: content[name][: len(change["segments"]) + 1]
            for name in ("losses", "errors", "labels")
        }
    with pytest.raises(ModeconnError, match=message):
        Certificate.from_dict(content)


def test_plain_values():
    value = {"a": (1, np.float32(0.5)), "b": np.arange(2), 3: math.inf, "t": torch.tensor(2)}
    assert plain(value) == {"a": [1, 0.5], "b": [0, 1], "3": "inf", "t": 2}
    with pytest.raises(ModeconnError, match="type object"):
        plain([object()])


@pytest.mark.parametrize("target", [math.nan, math.inf])
def test_a_target_must_be_a_number(target):
    with pytest.raises(ModeconnError, match="expected a finite loss"):
        certificate_of([1.0, 2.0], target)
