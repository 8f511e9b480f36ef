"""Kinds of segments, recognised by their weights; a moved live unit is never missed."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from certificate_cases import changed, walk_of
from modeconn.connection.segment_kinds import classify_segment
from modeconn.connection.verification import certify
from modeconn.errors import ModeconnError
from naive import mlp
from walk import KINDS, parts, walk

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
    with pytest.raises(
        ModeconnError, match=r"segment 0 .*values of layer 3 .*may reach .*even a dead one"
    ):
        certify(w.model, w.chain, w.path, w.data)
