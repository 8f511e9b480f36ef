"""Affine subspaces, and grids with ranges and counts of their own on each axis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import modeconn as mc


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()


def direction(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


X = torch.randn(17, 3, generator=torch.Generator().manual_seed(5)).double()
Y = torch.arange(17) % 2


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_sum_of_origin_and_directions(model, dim):
    directions = [direction(model, seed) for seed in range(dim)]
    path = mc.Subspace(model, directions)
    t = np.random.default_rng(dim).normal(size=(4, dim))
    points = t if dim > 1 else t[:, 0]
    options = {"buffers": "start", "precision": "float64"}
    result = mc.evaluate(model, path, (X, Y), points, **options)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for row, loss in zip(t, result.loss):
        moved = dict(state)
        for c, d in zip(row, directions):
            moved |= {name: moved[name] + c * value for name, value in d.items()}
        with torch.no_grad():
            outputs = torch.func.functional_call(model.eval(), moved, (X,))
        expected = nn.functional.cross_entropy(outputs, Y).item()
        assert loss == pytest.approx(expected, rel=1e-10)
        at = path.at(row if dim > 1 else float(row[0]))
        torch.testing.assert_close(at["0.weight"], moved["0.weight"])
    origin = path.at(np.zeros((1, dim)))
    assert all(torch.equal(origin[name], value) for name, value in state.items()), "bitwise"
    assert path.coefficients(t).tolist() == [[1.0, *row] for row in t.tolist()]


def test_two_random_directions_are_those_of_a_plane(model):
    plane = mc.Plane.random(model, seed=3, norm="layer", biases=True)
    space = mc.Subspace.random(model, 2, seed=3, norm="layer", biases=True)
    for one, other in zip(plane.control_points, space.control_points):
        assert all(torch.equal(one[name], other[name]) for name in one)
    state = model.state_dict()
    one = mc.Subspace.random(state, module=model, seed=3, norm="layer", biases=True)
    assert one.dim == 1
    assert torch.equal(one.control_points[1]["0.weight"], space.control_points[1]["0.weight"])
    assert not one.control_points[1]["1.running_mean"].any()


def test_grids(model):
    space = mc.Subspace(model, [direction(model, seed) for seed in range(3)])
    space.extent = [(0, 1), (-2, 2), (5, 5)]
    t = space.points(2)
    assert t.shape == (8, 3)
    assert space.grid((2, 3, 1)).tolist() == [
        [x, y, 5.0] for x in (0.0, 1.0) for y in (-2.0, 0.0, 2.0)
    ]
    line = mc.Subspace(model, [direction(model, 0)])
    assert line.points(5).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    plane = mc.Plane.random(model)
    plane.extent = ((-1.0, 1.0), (0.0, 3.0))
    assert plane.grid((3, 2)).tolist() == [[x, y] for x in (-1.0, 0.0, 1.0) for y in (0.0, 3.0)]
    np.testing.assert_array_equal(plane.points(4), plane.grid((4, 4)))
    result = mc.evaluate(model, plane, (X, Y), plane.grid((3, 2)), buffers="start")
    surface = result.loss.reshape(3, 2)
    alone = mc.evaluate(model, plane, (X, Y), [[1, 3]], buffers="start")
    assert surface[2, 1] == pytest.approx(alone.loss[0], rel=1e-6)


@pytest.mark.parametrize(
    "says, make",
    [
        ("directions is []: expected a list", lambda m: mc.Subspace(m, [])),
        ("directions is 'a.pt'", lambda m: mc.Subspace(m, "a.pt")),
        ("is [1], expected [5, 3]", lambda m: mc.Subspace(m, [{"0.weight": X[0, :1]}])),
        ("norm is 'row'", lambda m: mc.Subspace.random(m, norm="row")),
        ("dim is 0: expected", lambda m: mc.Subspace.random(m, 0)),
        ("points is (3,): expected", lambda m: mc.Plane.random(m).grid((3,))),
        ("points is (3, 0): expected", lambda m: mc.Plane.random(m).grid((3, 0))),
        ("points is (3, 2.0): expected", lambda m: mc.Plane.random(m).grid((3, 2.0))),
        (
            "shape [1, 2]: Subspace expects [T, 3]",
            lambda m: mc.Subspace.random(m, 3).points([0, 1]),
        ),
    ],
)
def test_refused(model, says, make):
    with pytest.raises(mc.ModeconnError) as error:
        make(model)
    assert says in str(error.value)
