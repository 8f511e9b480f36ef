"""The planner over segments: shared prefixes and contents, costs, and the printed plan."""

from __future__ import annotations

import pytest
from torch import nn

import modeconn as mc
import plan_cases
from naive import clone, mlp
from plan_cases import X, Y, agrees, classes, moved

# Fixtures.
model = plan_cases.model


def chain(model: nn.Module, segments: int, kind: str) -> mc.PolyChain:
    """Make points that move dead units of the last hidden layer ("rewrite") or the last one."""
    state = clone(model)
    state["4.weight"][:, 16:] = 0
    points = [state]
    for k in range(segments):
        if kind == "rewrite" or (kind == "both" and k % 2):
            points.append(
                moved(
                    moved(points[-1], "2.weight", rows=slice(16, None), seed=k),
                    "2.bias",
                    rows=slice(16, None),
                )
            )
        else:
            swung = moved(points[-1], "4.weight", seed=k)
            swung["4.weight"][:, 16:] = 0
            points.append(swung)
    return mc.PolyChain(points)


@pytest.mark.parametrize("kind", ["rewrite", "swing", "both"])
def test_the_networks_arithmetic_does_not_depend_on_the_number_of_points(model, kind):
    path = chain(model, 6, kind)
    few, many = (mc.explain(model, path, X, 6 * n + 1) for n in (10, 1000))
    assert few.network_flops == many.network_flops
    swings = {"rewrite": 0, "swing": 6, "both": 3}[kind]
    # A swing costs the combination of the logits: two of 10 numbers, 2 operations each. A
    # breakpoint costs nothing.
    assert many.point_flops <= swings * 1001 * 40
    assert (many.point_flops > 0) == (swings > 0)
    agrees(model, path, X, Y, 6 * 4 + 1)


def test_a_prefix_is_computed_once_for_all_segments(model):
    one, forty = (
        mc.explain(model, chain(model, count, "both"), X, 10 * count + 1) for count in (1, 40)
    )
    below = sum(
        step.flops
        for step in one.program.shared
        if step.node.op in ("linear", "relu") and step.node.id <= 4
    )
    logits = 2 * 16 * 10
    assert one.network_flops == below + 2 * logits
    # 20 swings pass through 21 different readouts
    assert forty.network_flops == below + 21 * logits


def test_readouts_of_disjoint_units_are_taken_apart():
    """A swing between subnetworks: each end is its own narrow network, shared with neighbours."""
    model = mlp(20, 32, 32, 10)
    state = clone(model)
    state["2.weight"][:16, 16:] = 0
    state["2.weight"][16:, :16] = 0
    left, right = clone(state), clone(state)
    left["4.weight"][:, 16:] = 0
    right["4.weight"][:, :16] = 0
    plan = mc.explain(model, mc.PolyChain([left, left, right, right]), X, 31)
    half = 2 * 20 * 16 + 16 + 2 * 16 * 16 + 16 + 2 * 16 * 10
    assert plan.network_flops == 2 * half
    agrees(model, mc.PolyChain([left, left, right, right]), X, Y, 31)


def test_equal_contents_are_shared_whatever_the_objects(model):
    other = {key: value.clone() for key, value in mlp(20, 33, 32, 10, seed=5).state_dict().items()}
    again = clone(other)
    plan = mc.explain(model, mc.PolyChain([model.state_dict(), other, again, clone(model)]), X, 31)
    assert [
        set(classes(model, mc.PolyChain([model.state_dict(), other, again]), X, 21, s))
        for s in (0, 1)
    ][1] == {"constant"}
    first_layer = [
        plan.program.shared[v] for v in plan.program.order if plan.program.shared[v].node.id == 1
    ]
    assert len(first_layer) == 2, "two different first layers, each computed once"


def test_points_that_coincide_are_evaluated_once(model):
    path = mc.Line(model, mlp(20, 33, 32, 10, seed=1))
    plan = mc.explain(model, path, X, [0.5, 0.0, 0.5, 0.5])
    assert len(plan.program.points) == 2 and plan.program.inverse.tolist() == [1, 0, 1, 1]


def test_the_printed_plan(model):
    text = str(mc.explain(model, chain(model, 4, "both"), X, 41))
    assert "16/32" in text and "combination" in text and "segments 1, 3 (" in text
    as_json = mc.explain(model, chain(model, 4, "both"), X, 41).to_json()
    assert as_json["points"] == 41 and len(as_json["segments"]) == 4
    assert as_json["flops_per_sample"]["plan"] == pytest.approx(
        as_json["flops_per_sample"]["once"] + as_json["flops_per_sample"]["per_point"]
    )
