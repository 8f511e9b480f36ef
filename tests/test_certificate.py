"""Certificates: kinds of segments, bounds against dense sampling, and every tampering is found."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modeconn.connection.certificate import Certificate, FalseCertificate, Outcome, Segment, plain
from modeconn.connection.connection import Connection
from modeconn.connection.segment_kinds import classify_segment
from modeconn.connection.verification import Claims, certify, verify
from modeconn.data.batches import Batches, as_batches
from modeconn.errors import ModeconnError
from naive import mlp, pass_per_point
from policy import assert_within_policy
from walk import KINDS, Walk, conv_net, parts, walk


@functools.cache  # tracing a network takes a good part of a second
def walk_of(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Walk:
    if kind == "conv":
        torch.manual_seed(seed)
        return walk(conv_net(), (2, 8, 8), seed, dtype=dtype)
    activation = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}[kind]
    return walk(mlp(5, 8, 9, 6, 4, activation=activation), (5,), seed, dtype=dtype)


@pytest.fixture(scope="module", params=["relu", "conv"])
def made(request) -> tuple[Walk, Connection]:
    """A path and its certified connection; tests do not change them."""
    w = walk_of(request.param)
    return w, connect(w)


def connect(w: Walk, **options) -> Connection:
    certificate = certify(w.model, w.chain, w.path, w.data, Claims(**options))
    return Connection(w.path, [segment.kind for segment in certificate.segments], certificate)


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize("kind", ["relu", "tanh", "gelu", "conv"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_kind_of_segment_is_recognised_and_holds(kind, seed):
    w = walk_of(kind, seed, torch.float64)
    for k, expected in enumerate(KINDS):
        found = classify_segment(w.chain, w.points[k], w.points[k + 1])
        assert found.kind == expected, f"segment {k}"
        assert set(found.moved) == {
            key for key in w.points[k] if not torch.equal(w.points[k][key], w.points[k + 1][key])
        }
        inside = {
            key: torch.lerp(v, w.points[k + 1][key], 0.3) if v.is_floating_point() else v
            for key, v in w.points[k].items()
        }
        outputs = [w.chain.run(state, w.x) for state in (w.points[k], inside, w.points[k + 1])]
        if expected == "swing":
            torch.testing.assert_close(
                outputs[1], torch.lerp(outputs[0], outputs[2], 0.3), rtol=1e-12, atol=1e-12
            )
            assert not torch.allclose(outputs[0], outputs[2])
        else:
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(st.data())
def test_a_moved_live_unit_is_never_missed(data):
    kind = data.draw(st.sampled_from(["relu", "conv"]))
    w = walk_of(kind, data.draw(st.integers(0, 3)))
    k = data.draw(st.sampled_from([k for k, name in enumerate(KINDS) if name != "swing"]))
    layer = data.draw(st.sampled_from(w.chain.layers[:-1]))
    key = data.draw(st.sampled_from(layer.incoming()))
    # Live where a change of its rows changes the outputs: B in the middle of the walk, A elsewhere,
    # both in the shift.
    a, b = parts(w.chain, layer.index)[:2]
    unit = int(data.draw(st.sampled_from(list(b if k in (2, 3) else a))))
    stop = {name: value.clone() for name, value in w.points[k + 1].items()}
    stop[key][unit] += 0.25
    # Of units that trade weights but are not equal, the layer that reads them is told.
    where = r"layer \d" if KINDS[k] == "shift" else rf"layer {layer.index} \({layer.weight}\)"
    with pytest.raises(ModeconnError, match=rf"{where}.*: .*live unit"):
        classify_segment(w.chain, w.points[k], stop)


def changed(w: Walk, k: int, key: str, where, value: float) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in w.points[k].items()}
    state[key][where] += value
    return state


def test_a_shift_needs_equal_twins():
    w = walk_of("conv")
    first, second = w.chain.layers[0], w.chain.layers[1]
    assert classify_segment(w.chain, w.points[3], w.points[4]).kind == "shift"
    a, b = (int(units[0]) for units in parts(w.chain, 1)[:2])
    # another row, bias or norm entry: at the start, at the end, at both
    for key in first.incoming():
        for where in ({3}, {4}, {3, 4}):
            ends = [changed(w, k, key, a, 0.125) if k in where else w.points[k] for k in (3, 4)]
            with pytest.raises(ModeconnError, match="live unit"):
                classify_segment(w.chain, *ends)
    row = int(parts(w.chain, 2)[0][0])
    for unit in (a, b):  # more arrives than leaves
        with pytest.raises(ModeconnError, match="live unit"):
            classify_segment(w.chain, w.points[3], changed(w, 4, second.weight, (row, unit), 0.125))


def test_a_shift_within_a_class_of_many_is_exact():
    """Three equal units trade weights that float64 adds up differently in another order."""
    w = walk(mlp(3, 4, 2), (3,))
    start = {key: value.clone() for key, value in w.points[0].items()}
    start["0.weight"][:], start["0.bias"][:] = start["0.weight"][:1].clone(), 0.5
    weights = torch.tensor([1.0, 2.0**-40, 2.0**-80, 3.0**-20])
    start["2.weight"][:] = weights
    stop = start | {"2.weight": start["2.weight"].clone(), "0.bias": start["0.bias"].clone()}
    stop["2.weight"][0] = weights.flip(0)
    # the output layer alone: nothing more to show
    assert classify_segment(w.chain, start, stop).kind == "swing"
    deep = walk(mlp(3, 4, 4, 2), (3,))
    start = {key: value.clone() for key, value in deep.points[0].items()}
    start["0.weight"][:], start["0.bias"][:] = start["0.weight"][:1].clone(), 0.5
    start["2.weight"][:] = weights
    start["4.weight"][:] = 1
    stop = start | {
        "2.weight": torch.stack([weights, weights.flip(0), weights.roll(1), weights.roll(2)])
    }
    assert classify_segment(deep.chain, start, stop).kind == "shift"
    stop["2.weight"][0, 0] += 2.0**-20
    with pytest.raises(ModeconnError, match="live unit"):
        classify_segment(deep.chain, start, stop)


def test_dead_through_a_dead_unit_above():
    """A unit is dead where every way up is cut, not only the next weight."""
    w = walk(mlp(3, 4, 4, 2), (3,))
    start = {key: torch.ones_like(value) for key, value in w.points[0].items()}
    start["4.weight"][:, 1:] = 0  # only unit 0 of layer 2 is live
    start["2.weight"][0, 2:] = 0  # it reads units 0 and 1 of layer 1
    stop = {key: value.clone() for key, value in start.items()}
    stop["2.weight"][1:], stop["0.weight"][2:], stop["0.bias"][3] = 5, -7, 9
    found = classify_segment(w.chain, start, stop)
    assert (found.kind, found.text) == (
        "rewrite",
        "only dead units move: 2 of layer 1, 3 of layer 2",
    )
    stop["4.weight"][1, 3] = 1e-30
    with pytest.raises(ModeconnError, match=r"layer 3 \(4.weight\): 1 live unit moves: 1"):
        classify_segment(w.chain, start, stop)


def test_a_swing_moves_the_output_layer_alone():
    w = walk_of("relu")
    both = dict(w.points[2]) | {"0.weight": w.points[2]["0.weight"] * 2}
    with pytest.raises(ModeconnError, match="live unit"):
        classify_segment(w.chain, w.points[1], both)


def test_entries_of_no_layer():
    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            self.register_buffer("unused", torch.zeros(2))
            self.register_buffer("count", torch.tensor(0))

    w = walk(Scaled(), (3,))
    start = w.points[0]
    assert classify_segment(w.chain, start, start | {"count": torch.tensor(5)}).moved == ()
    with pytest.raises(
        ModeconnError, match="unused changes, and is no parameter or buffer of a layer"
    ):
        classify_segment(w.chain, start, start | {"unused": torch.ones(2)})


def test_negative_zero_is_no_change_of_the_function():
    w = walk_of("relu")
    zeros = {key: torch.where(value == 0, -value, value) for key, value in w.points[0].items()}
    assert classify_segment(w.chain, w.points[0], zeros).moved == ()
    for k, kind in enumerate(KINDS):
        ends = [
            w.points[k],
            {key: torch.where(v == 0, -0.0 * v, v) for key, v in w.points[k + 1].items()},
        ]
        assert classify_segment(w.chain, *ends).kind == kind


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite(bad):
    w = walk_of("relu")
    stop = changed(w, 1, "0.weight", (7, 0), bad)  # a dead unit
    with pytest.raises(ModeconnError, match=r"0\.weight is not finite"):
        classify_segment(w.chain, w.points[0], stop)


def test_a_variance_below_zero_is_refused_even_in_a_dead_unit():
    w = walk_of("conv")
    key = w.chain.layers[0].norm.var
    with pytest.raises(
        ModeconnError, match=r"1\.running_var holds -1: a variance cannot be negative"
    ):
        classify_segment(
            w.chain, w.points[0], w.points[0] | {key: torch.tensor([1.0, 1, 1, 1, 1, -1])}
        )


def test_a_dead_unit_that_overflows_is_found():
    """Zero times infinity: the plain network gives NaN where the engine leaves the unit out."""
    w = walk_of("relu")
    points = [
        point | {"0.weight": point["0.weight"].clone(), "2.weight": point["2.weight"].clone()}
        for point in w.points[:2]
    ]
    points[1]["0.weight"][4] = 1e30
    points[1]["2.weight"][4] = 1e30
    w = dataclasses.replace(w, points=points)
    assert classify_segment(w.chain, *w.points).kind == "rewrite"
    with pytest.raises(ModeconnError, match="breakpoint 1: a plain pass gives other outputs"):
        certify(w.model, w.chain, w.path, w.data)


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


def test_weights_too_large_for_a_loss_are_undecided():
    w = walk_of("relu")
    large = [
        point | {key: point[key] * 1e37 for key in ("4.weight", "6.weight")} for point in w.points
    ]
    w = dataclasses.replace(w, points=large)
    certificate = certify(w.model, w.chain, w.path, w.data)
    assert certificate.outcome is Outcome.UNDECIDED
    assert certificate.error_bound == 1.0


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
        ({"format": "modeconn.Certificate/2"}, "format 'modeconn.Certificate/2'"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": "60"}, "samples is '60'"),
        ({"bound": "big"}, "KeyError: 'big'"),
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
    assert verify(w.model, both, other).same_data
    lower = dataclasses.replace(found, bound=0.0)
    with pytest.raises(FalseCertificate, match="bound is 0"):
        verify(w.model, dataclasses.replace(connection, test_certificate=lower), other)


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
