"""Weighted sums of networks: their weights, and a mixture equals the sums one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modeconn as mc
from modeconn.parameters import mixtures as soups
from naive import mlp, pass_per_point
from policy import assert_within_policy
from refused import refused


@settings(max_examples=20)
@given(count=st.integers(1, 4), steps=st.integers(1, 6))
def test_a_grid_has_every_weight_once(count, steps):
    grid = soups.simplex_grid(count, steps)
    assert len(grid) == math.comb(steps + count - 1, count - 1) == len(np.unique(grid, axis=0))
    np.testing.assert_allclose(grid.sum(1), 1.0)
    assert (grid >= 0).all() and np.array_equal(np.round(grid * steps), grid * steps)


def test_draws_are_on_the_simplex_and_follow_the_seed():
    drawn = soups.random_simplex(3, 500, seed=1)
    assert drawn.shape == (501, 3) and np.array_equal(drawn[0], np.full(3, 1 / 3))
    np.testing.assert_allclose(drawn.sum(1), 1.0)
    np.testing.assert_allclose(drawn.mean(0), 1 / 3, atol=0.05)
    assert np.array_equal(drawn, soups.random_simplex(3, 500, seed=1))
    assert not np.array_equal(drawn, soups.random_simplex(3, 500, seed=2))


def test_subsets_and_scales():
    assert sorted(soups.subset_means(2).tolist()) == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    assert len(soups.subset_means(5)) == 31
    scaled = soups.task_arithmetic(2, [0.0, 0.5])
    assert scaled.tolist() == [[0, 0, 1], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    with refused("11 networks have 2,047 subsets"):
        soups.subset_means(11)
    with refused("that makes", "at most 100,000"):
        soups.task_arithmetic(9, [0.0, 0.3, 0.6, 1.0])


def test_a_greedy_soup_takes_what_helps():
    """Networks are points in a plane; the score is the distance of their mean from the origin."""
    places = np.array([[1.0, 0.0], [-1.5, 0.0], [0.0, 4.0], [0.0, -3.0]])
    asked = []

    def score(coefficients: np.ndarray) -> np.ndarray:
        asked.append(len(coefficients))
        return np.linalg.norm(coefficients @ places, axis=1)

    seen = soups.greedy_soup(4, score)
    assert asked == [4, 1, 1, 1]
    # the first two are better together; neither of the others helps them
    assert seen[4].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert seen[5:].tolist() == [[1 / 3, 1 / 3, 0.0, 1 / 3], [1 / 3, 1 / 3, 1 / 3, 0.0]]
    assert np.linalg.norm(seen @ places, axis=1).argmin() == 4


def test_hundreds_of_sums_in_one_pass():
    nets = [mlp(6, 7, 4, seed=seed) for seed in range(3)]
    x, y = torch.randn(63, 6), torch.arange(63) % 4
    path, t = mc.Mixture(nets), soups.simplex_grid(3, 20)
    got = mc.evaluate(nets[0], path, (x, y), t)
    assert len(t) == 231 and got.passes == 1
    plain, exact = (
        pass_per_point(nets[0], path, x, y, t, dtype) for dtype in (torch.float32, torch.float64)
    )
    assert_within_policy("loss", got.loss, plain["loss"], exact["loss"], torch.float32)


# -- the plane of a trajectory ---------------------------------------------------------------------


def states(places: np.ndarray, off: float = 0.0) -> list[dict[str, torch.Tensor]]:
    """Checkpoints at given places in a plane of parameter space, and a little off it."""
    generator = torch.Generator().manual_seed(0)
    base, u, v = (torch.randn(40, generator=generator, dtype=torch.float64) for _ in range(3))
    u /= u.norm()
    v = v - (v @ u) * u
    v /= v.norm()
    out = []
    for x, y in places:
        weight = (
            base + x * u + y * v + off * torch.randn(40, generator=generator, dtype=torch.float64)
        )
        out.append({"weight": weight.view(4, 10), "running_mean": torch.full((3,), float(x))})
    return out


def test_a_trajectory_in_a_plane_is_found_again():
    places = np.array([[3.0, 0.5], [2.0, -0.5], [1.0, 0.2], [0.2, 0.3], [0.0, 0.0]])
    plane = mc.Plane.trajectory(states(places))
    assert plane.explained is not None and sum(plane.explained) == pytest.approx(1.0)
    assert plane.explained[0] > plane.explained[1] > 0
    np.testing.assert_allclose(plane.marks[-1], 0, atol=1e-12)
    # distances are those of the checkpoints: the plane is turned, not stretched
    for i in range(5):
        np.testing.assert_allclose(
            np.linalg.norm(plane.marks - plane.marks[i], axis=1),
            np.linalg.norm(places - places[i], axis=1),
            atol=1e-9,
        )
    for mark, state in zip(plane.marks, states(places)):
        at = plane.at(mark)
        torch.testing.assert_close(at["weight"], state["weight"], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(at["running_mean"], state["running_mean"])
    u, v = (plane.control_points[k]["weight"].flatten() for k in (1, 2))
    torch.testing.assert_close(
        torch.stack([u @ u, u @ v, v @ v]), torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    )
    grid = plane.points(9)
    assert grid.shape == (81, 2)
    assert (grid.min(0) < plane.marks.min(0)).all() and (grid.max(0) > plane.marks.max(0)).all()


def test_what_is_off_the_plane_is_projected_away():
    places = np.array([[3.0, 0.5], [2.0, -0.5], [1.0, 0.2], [0.0, 0.0]])
    checkpoints = states(places, off=0.05)
    plane = mc.Plane.trajectory(checkpoints, centre=0)
    assert plane.explained is not None and 0.8 < sum(plane.explained) < 1.0
    base = checkpoints[0]["weight"]
    for mark, state in zip(plane.marks, checkpoints):
        offset = (state["weight"] - base).flatten()
        expected = [float(plane.control_points[k]["weight"].flatten() @ offset) for k in (1, 2)]
        np.testing.assert_allclose(mark, expected, atol=1e-9)


def test_trajectories_that_have_no_plane():
    with refused("lie on one line"):
        mc.Plane.trajectory(states(np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])))
    with refused("at least 3 control points, got 2"):
        mc.Plane.trajectory(states(np.array([[0.0, 0.0], [1.0, 0.0]])))
    with refused("centre is 3"):
        mc.Plane.trajectory(states(np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])), centre=3)


def test_a_trajectory_is_drawn():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    nets = [mlp(6, 7, 4, seed=seed) for seed in range(4)]
    x, y = torch.randn(30, 6), torch.arange(30) % 4
    result = mc.evaluate(nets[0], mc.Plane.trajectory(nets), (x, y), 5)
    ax = Figure().add_subplot()
    result.plot(ax)
    assert [text.get_text() for text in ax.texts] == ["1", "2", "3", "4"]
    assert any(len(line.get_xdata()) == 4 for line in ax.lines), "the checkpoints are joined"
    space = Figure().add_subplot(projection="3d")
    result.plot(space, surface=True)
    assert space.get_zlabel().endswith("loss") and len(space.collections) == 1
    with refused('projection="3d"'):
        result.plot(Figure().add_subplot(), surface=True)
    line = mc.evaluate(nets[0], mc.Line(*nets[:2]), (x, y), 3)
    with refused("a surface needs t with two coordinates"):
        line.plot(surface=True)
