"""Every optimisation can be switched off: another plan or path is taken, to the same numbers."""

from __future__ import annotations

from collections import Counter
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.backends.native import extension as native
from modeconn.backends.native.partition import whole_subgraph
from modeconn.capture import cache, export
from modeconn.capture.optimisations import NAMES, Optimisations, current, without
from modeconn.plan.program import Combination, Program
from naive import clone, mlp, pass_per_point
from plan_cases import moved
from policy import assert_within_policy

ROWS = torch.randn(33, 20, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(33, 4, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(33) % 10
pytestmark = pytest.mark.filterwarnings("ignore:batch norms .* have interpolated")
# Points on control points and between them, and such whose coefficients do not sum to 1.
CHAIN, PLANE = np.linspace(0, 1, 13), [[0.0, 0.0], [0.25, 0.75], [-0.5, 2.0]]


class Overlapping(nn.Module):
    """Reads two overlapping parts of a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 12), nn.Linear(12, 10)
        self.norm = nn.LayerNorm(12)
        self.low, self.high = nn.Linear(6, 10), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        value = self.second(self.norm(torch.tanh(self.first(x))))
        return self.low(value[:, :6]) + self.high(value[:, 4:])


def rows_net() -> tuple[nn.Module, mc.PolyChain]:
    """A chain on which dead units, then the last layer, move."""
    model = mlp(20, 33, 32, 10)
    start = clone(model)
    start["4.weight"][:, 20:] = 0
    dead = moved(start, "2.weight", rows=slice(20, None))
    swung = moved(dead, "4.weight")
    swung["4.weight"][:, 20:] = 0
    return model, mc.PolyChain([start, dead, swung, moved(swung, "2.bias", rows=slice(20, None))])


def overlapping_net() -> tuple[nn.Module, mc.Line]:
    torch.manual_seed(0)
    model = Overlapping()
    state = clone(model)
    return model, mc.Line(state, {k: v + 0.1 * torch.randn_like(v) for k, v in state.items()})


def image_net() -> tuple[nn.Module, mc.Line]:
    """Convolutions that pay by Winograd, with norms behind them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Conv2d(4, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU()],
        *[nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 10)],
    )
    start, end = clone(model), clone(model)
    for state in (start, end):
        for name, value in state.items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point():
                value += 0.1 * torch.randn_like(value)
    return model, mc.Line(start, end)


MADE = {"rows": rows_net(), "overlapping": overlapping_net(), "images": image_net()}
# Those that change no plan have tests of their own.
APART = ("winograd", "direct", "reuse")
# Where each optimisation has something to do.
WHERE = {"merging": "overlapping", "folding": "images", "winograd": "images"}


def program(name: str) -> Program:
    model, path = MADE[name]
    return mc.explain(model, path, IMAGES if name == "images" else ROWS, CHAIN).program


def seen(name: str) -> object:
    """What an optimisation changes, as far as it can be counted."""
    place = WHERE.get(name, "rows")
    if name == "parting":
        model, path = MADE["overlapping"]
        line = mc.Line(*path.control_points, groups=[["first", "norm", "second"], "*"])
        points = [[s, t] for s in (0.0, 0.5) for t in CHAIN]
        return mc.explain(model, line, ROWS, points).flops
    plan = program(place)
    if name == "dead":
        return [step.numel for step in plan.shared if step.node.op == "linear"]
    if name == "constant":
        return plan.shared_flops, [len(segment.steps) for segment in plan.segments]
    if name == "combination":
        forms = [form for segment in plan.segments for form in segment.outputs.values()]
        return sum(isinstance(form, Combination) and not form.constant for form in forms)
    if name == "merging":
        steps = Counter(step.node.op for step in plan.segments[0].steps)
        return steps["linear"]
    if name == "folding":
        layers = whole_subgraph(plan, plan.segments[0]).steps.layers
        return sum(layer.op == "affine" for layer in layers)
    return len(plan.order)  # sharing


@pytest.mark.parametrize("name", [name for name in NAMES if name not in APART])
def test_each_switch_changes_the_plan(name: str):
    on = seen(name)
    with without(name):
        off = seen(name)
    assert seen(name) == on != off


def test_without_dead_units_every_value_is_whole():
    with without("dead"):
        plan = program("rows")
    assert not any(step.units for step in plan.shared)


def test_without_sharing_segments_have_values_of_their_own():
    shared = len(program("rows").order)
    with without("sharing"):
        plan = program("rows")
    taken = [segment.taken() for segment in plan.segments]
    assert len(plan.order) > shared
    assert not set.intersection(*taken) and sum(map(len, taken)) == len(set().union(*taken))


def test_without_constants_and_combinations_everything_varies():
    with without("constant", "combination"):
        plan = program("rows")
    assert [plan.shared[value].node.op for value in plan.order] == ["input"]
    assert [len(segment.steps) for segment in plan.segments] == [5, 5, 5]


@pytest.mark.skipif(not native.available(), reason="no C++ extension")
def test_without_winograd_the_engine_sums_in_another_order():
    model, path = MADE["images"]

    def bits() -> bytes:
        return mc.evaluate(model, path, (IMAGES, Y), 3, backend="native").loss.tobytes()

    on = bits()
    with without("winograd"):
        off = bits()
    assert bits() == on != off


def test_without_the_direct_way_torch_export_captures(
    monkeypatch: pytest.MonkeyPatch, fresh_graphs: None
):
    exported, exports = export._export, []
    monkeypatch.setattr(export, "_export", lambda *args: exports.append(1) or exported(*args))

    def captured() -> list[str]:
        monkeypatch.setattr(cache, "_GRAPHS", WeakKeyDictionary())
        model, _ = MADE["rows"]
        return [node.op for node in export.capture(model, ROWS).nodes]

    on = captured()
    assert not exports
    with without("direct"):
        off = captured()
    assert exports and on == off


def test_without_reuse_every_call_captures(monkeypatch: pytest.MonkeyPatch):
    tried, captures = export._tried, []
    monkeypatch.setattr(export, "_tried", lambda *args: captures.append(1) or tried(*args))
    monkeypatch.setattr(cache, "_GRAPHS", WeakKeyDictionary())
    for expected in (1, 1):
        program("rows")
        assert len(captures) == expected
    with without("reuse"):
        program("rows")
    assert len(captures) == 2
    program("rows")
    assert len(captures) == 2


def test_switches_end_with_their_block():
    assert current() == Optimisations()
    with without("dead"):
        assert not current().dead and current().folding
        with without("folding"):
            assert not current().dead and not current().folding
        assert current().folding
    assert current() == Optimisations()
    with pytest.raises(TypeError, match="no_such"):
        without("no_such").__enter__()


BACKENDS = ["reference", *(["native"] if native.available() else [])]


@pytest.fixture(scope="module")
def referees() -> dict[str, object]:
    """Plain passes at both precisions, by the network and the path's dimension."""
    found = {}
    for name, (model, path) in MADE.items():
        x = IMAGES if name == "images" else ROWS
        ends = path.control_points
        plane = mc.Plane.through(ends[0], ends[-1], clone(model))
        # Of one point the engine is given vectors with one row, where constants are off.
        cases = (("line", path, CHAIN), ("plane", plane, PLANE), ("one", path, [0.4]))
        for kind, along, points in cases:
            t = along.points(points)
            passes = [
                pass_per_point(model, along, x, Y, t, dtype)
                for dtype in (torch.float32, torch.float64)
            ]
            found[name, kind] = (along, x, points, *passes)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("off", [*[(name,) for name in NAMES], NAMES, NAMES[:3]], ids="+".join)
def test_numbers_are_the_same(referees, off: tuple[str, ...], backend: str):
    for (name, _), (path, x, points, plain, exact) in referees.items():
        with without(*off):
            got = mc.evaluate(MADE[name][0], path, (x, Y), points, backend=backend)
        for metric in ("loss", "error"):
            values = got.values[metric], plain[metric], exact[metric]
            assert_within_policy(f"{name} {metric}", *values, torch.float32)


@pytest.mark.parametrize("off", [("folding",), NAMES], ids="+".join)
def test_kernels_without_folding(off: tuple[str, ...], referees):
    pytest.importorskip("triton")
    model, _ = MADE["images"]
    path, *_ = referees["images", "line"]
    x, y = IMAGES[:3], Y[:3]
    with without(*off):
        got = mc.evaluate(model, path, (x, y), [0.0, 0.4], backend="triton")
    passes = [
        pass_per_point(model, path, x, y, got.t, dtype)["loss"]
        for dtype in (torch.float32, torch.float64)
    ]
    assert_within_policy("loss", got.loss, *passes, torch.float32)
