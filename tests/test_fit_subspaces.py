"""Trained lines and simplices: their regularisers, what moves, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import modeconn as mc
from modeconn.training.curves.subspaces import _cosine, _drawn, _log_volume
from naive import mlp

X = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


@pytest.fixture(scope="module")
def nets() -> list[nn.Module]:
    return [mlp(6, 12, 3, seed=k).requires_grad_(False) for k in range(2)]


def test_a_line_is_trained_from_untrained_ends(nets):
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    found = mc.fit_line(nets[0], *nets, (X, Y), steps=250, lr=1e-2, points=11, test=(X, Y))
    assert type(found.path) is mc.Line and found.result.loss.max() < 0.3
    for net, kept, point in zip(nets, before, found.path.control_points):
        assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
        assert not any(torch.equal(v, kept[k]) for k, v in point.items())
    apart = mc.fit_line(nets[0], *nets, (X, Y), steps=250, lr=1e-2, points=11, beta=100.0)
    cosines = [
        abs(float(torch.cosine_similarity(*(flat(p) for p in f.path.control_points), dim=0)))
        for f in (found, apart)
    ]
    assert cosines[1] < 0.02


def flat(point: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in point.values()])


def test_a_simplex_grows_by_a_vertex(nets):
    first = mc.fit_line(nets[0], *nets, (X, Y), steps=250, lr=1e-2, points=2)
    vertices = first.path.control_points
    small, large = (
        mc.fit_simplex(nets[0], vertices, (X, Y), steps=150, lr=1e-2, volume=v, points=9)
        for v in (0.0, 1e-2)
    )
    for found in (small, large):
        assert type(found.path) is mc.Mixture and found.path.dim == 3
        for one, other in zip(found.path.control_points, vertices):
            assert all(torch.equal(one[k], other[k]) for k in other)
        assert found.result.t.shape == (3 + 1 + 9, 3) and found.result.loss.max() < 0.4
        assert "at t = (" in str(found)
    sizes = [volume(found.path.control_points) for found in (small, large)]
    assert sizes[1] > sizes[0]


def test_a_saved_simplex_is_read_again(nets, tmp_path):
    file = tmp_path / "s.safetensors"
    found = mc.fit_simplex(nets[0], nets[:1], (X, Y), epochs=2, points=3, checkpoint=file)
    again = mc.load_path(file, model=nets[0])
    assert type(again) is mc.Mixture and again.dim == 2
    assert all(
        torch.equal(v, again.control_points[1][k]) for k, v in found.path.control_points[1].items()
    )


def volume(points: list[dict[str, torch.Tensor]]) -> float:
    """Heron's formula."""
    a, b, c = (flat(p).double() for p in points)
    x, y, z = (float(torch.dist(*pair)) for pair in ((a, b), (b, c), (c, a)))
    s = (x + y + z) / 2
    return math.sqrt(s * (s - x) * (s - y) * (s - z))


def test_regularisers_are_those_of_the_papers():
    points = torch.randn(3, 7, dtype=torch.float64)
    rows = [{"w": row} for row in points]
    # the volume of a triangle is the root of the determinant over 2!
    expected = math.log(volume(rows) * 2)
    assert float(_log_volume(1.0, points)) == pytest.approx(expected)
    cosine = float(torch.cosine_similarity(points[0], points[1], dim=0))
    assert float(_cosine(2.0, points[:2])) == pytest.approx(2 * cosine**2)


def test_networks_are_drawn_evenly_from_a_simplex():
    rows = np.array([_drawn(3, 0, step)[1] for step in range(3000)])
    assert np.allclose(rows.sum(1), 1) and rows.min() >= 0
    assert np.abs(rows.mean(0) - 1 / 3).max() < 0.02
    # a corner that is cut off at half of its height has a quarter of a triangle's area
    assert abs((rows[:, 0] > 0.5).mean() - 0.25) < 0.03


@pytest.mark.parametrize("name, value", [("beta", -1.0), ("beta", True)])
def test_bad_weights(nets, name, value):
    with pytest.raises(mc.ModeconnError, match=f"{name} is {value}: expected a number"):
        mc.fit_line(nets[0], *nets, (X, Y), steps=1, **{name: value})
    with pytest.raises(mc.ModeconnError, match="volume is inf"):
        mc.fit_simplex(nets[0], nets, (X, Y), steps=1, volume=math.inf)
