"""Paths: coefficients, end points to the bit, planes and their directions, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import modeconn as mc
from naive import clone, mlp


def states(count: int) -> list[dict[str, Tensor]]:
    return [clone(mlp(3, 4, 2, seed=k)) for k in range(count)]


def awkward() -> dict[str, Tensor]:
    """Numbers that 1·a + 0·b would change: negative zero, subnormals."""
    state = states(1)[0]
    state["0.weight"][0, :3] = torch.tensor([-0.0, 1e-42, -1e-42])
    return state


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a
    )


@pytest.mark.parametrize(
    "make, ends",
    [
        (lambda a, b, c: mc.Line(a, c), (0, 1)),
        (lambda a, b, c: mc.PolyChain([a, b, c]), (0, 1)),
        (lambda a, b, c: mc.Bezier([a, b, c]), (0, 1)),
        (mc.Plane.through, ((0, 0), (0, 1))),
        (lambda a, b, c: mc.Mixture([a, b, c]), ((1, 0, 0), (0, 0, 1))),
    ],
    ids=["line", "polychain", "bezier", "plane", "mixture"],
)
def test_end_points_are_bitwise(make, ends):
    a, b = awkward(), states(2)[1]
    c = {name: -value for name, value in awkward().items()}
    path = make(a, b, c)
    assert same_bits(path.at(ends[0]), a) and same_bits(path.at(ends[1]), c)


@pytest.mark.parametrize("segments", [1, 2, 3, 7, 40, 49, 98])
def test_breakpoints_of_a_chain_are_bitwise(segments):
    points = states(segments + 1)
    path = mc.PolyChain(points)
    for k in range(segments + 1):  # i / n · n is not always i in floating point
        assert same_bits(path.at(k / segments), points[k])


@given(t=st.floats(-2, 3))
def test_coefficients_add_up_to_one(t):
    a, b, c = states(3)
    for path in (mc.Line(a, b), mc.PolyChain([a, b, c]), mc.Bezier([a, b, c])):
        row = path.coefficients([t])
        assert row.dtype == torch.float64 and row.sum().item() == pytest.approx(1.0, abs=1e-12)


def test_bezier_is_the_bernstein_polynomial():
    a, b, c = states(3)
    t = 0.3
    row = mc.Bezier([a, b, c]).coefficients([t])[0]
    torch.testing.assert_close(row, torch.tensor([0.49, 0.42, 0.09], dtype=torch.float64))


def test_a_chain_extends_its_end_segments():
    path = mc.PolyChain(states(3))
    torch.testing.assert_close(
        path.coefficients([-0.5, 1.25]), torch.tensor([[2.0, -1.0, 0.0], [0.0, -0.5, 1.5]]).double()
    )


def test_a_plane_of_directions():
    origin, u = states(2)
    path = mc.Plane(origin, u, {"0.bias": torch.ones(4)})  # entries left out are zero
    at = path.at((0.5, 2.0))
    torch.testing.assert_close(at["0.bias"], origin["0.bias"] + 0.5 * u["0.bias"] + 2.0)
    torch.testing.assert_close(at["2.weight"], origin["2.weight"] + 0.5 * u["2.weight"])
    assert path.points(5).shape == (25, 2)


@pytest.mark.parametrize("norm", ["filter", "layer", None])
def test_random_directions(norm):
    model = mlp(3, 4, 2)
    path, again, other = (mc.Plane.random(model, seed=seed, norm=norm) for seed in (1, 1, 2))
    (_, u, v), weight = path.control_points, model.state_dict()["0.weight"]
    assert (
        same_bits(u, again.control_points[1])
        and not same_bits(u, other.control_points[1])
        and not same_bits(u, v)
    )
    assert not u["0.bias"].any(), "vectors do not move"
    if norm == "filter":
        torch.testing.assert_close(u["0.weight"].norm(dim=1), weight.norm(dim=1))
    elif norm == "layer":
        torch.testing.assert_close(u["0.weight"].norm(), weight.norm())
        assert not torch.allclose(u["0.weight"].norm(dim=1), weight.norm(dim=1))
    assert mc.Plane.random(model, biases=True).control_points[1]["0.bias"].any()
    assert path.points(3)[0].tolist() == [-1.0, -1.0]


def test_random_directions_leave_running_statistics_alone():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    u = mc.Plane.random(model, biases=True).control_points[1]
    assert not u["1.running_mean"].any() and not u["1.running_var"].any() and u["1.weight"].any()


def test_integers_stay_those_of_the_start():
    a, b = (clone(torch.nn.BatchNorm1d(2)) for _ in range(2))
    b["num_batches_tracked"] += 7
    assert mc.Line(a, b).at(0.5)["num_batches_tracked"].item() == 0


@pytest.mark.parametrize(
    "points, says",
    [
        (0, "points is 0"),
        (-3, "points is -3"),
        ([], "empty"),
        ([0.0, float("nan")], r"points\[1\] is nan"),
        ([[0.0, 1.0]], r"shape \[1, 2\]"),
        ("many", "points must be"),
        ([0.0, float("inf")], "finite"),
        (2.5, r"expected points=101 for a count, or a list such as \[0.5\]"),
        (101.0, "points is 101.0"),
        ("101", "points=101"),
        (True, "points must be"),
        ([True, False], "points must be"),
        (["0.5"], "points must be"),
    ],
)
def test_points_are_checked(points, says):
    path = mc.Line(*states(2))
    with pytest.raises(mc.ModeconnError, match=says):
        path.points(points)


def test_bad_paths():
    a, b = states(2)
    with pytest.raises(mc.ModeconnError, match="at least 2 control points, got 1"):
        mc.PolyChain([a])
    with pytest.raises(mc.ModeconnError, match="list of control points"):
        mc.Bezier(a)
    with pytest.raises(mc.ModeconnError, match=r"0\.weight"):
        mc.Line(a, {**b, "0.weight": torch.zeros(5, 3)})
    with pytest.raises(mc.ModeconnError, match=r"2\.bias"):
        mc.Line(a, {**b, "2.bias": torch.full((2,), float("nan"))})
    with pytest.raises(mc.ModeconnError, match="complex64"):
        mc.Line(
            {k: v.to(torch.complex64) for k, v in a.items()},
            {k: v.to(torch.complex64) for k, v in b.items()},
        )
    with pytest.raises(mc.ModeconnError, match="norm is 'rows'"):
        mc.Plane.random(a, norm="rows")
    with pytest.raises(mc.ModeconnError, match="no default grid"):
        mc.Mixture([a, b]).points(11)


def test_a_mixture_of_one():
    (a,) = states(1)
    path = mc.Mixture([a])
    assert path.coefficients([[0.5], [2.0]]).tolist() == [[0.5], [2.0]]
    assert np.allclose(path.at([2.0])["0.bias"], 2 * a["0.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    a, b = ({k: v.to(dtype) for k, v in state.items()} for state in states(2))
    path = mc.Line(a, b)
    assert all(value.dtype == torch.float32 for value in path.at(0.5).values())
    assert all(torch.equal(path.at(1.0)[key], value.float()) for key, value in b.items())
