"""Adaptive points: few points on all data that find what a dense grid finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import modeconn as mc
from modeconn.evaluation.adaptive.guided import GuidedSearch
from modeconn.evaluation.adaptive.parts import parts_of
from modeconn.evaluation.adaptive.searches import (
    MOST,
    BreakPoints,
    Budget,
    Goal,
    Known,
    PartsSearch,
)
from naive import mlp

N = 1200
X = torch.randn(N, 12, generator=torch.Generator().manual_seed(0))
Y = (X[:, :3].argmax(1) + 3 * (X[:, 4] > 0)).long()
GOAL = Goal()


def trained(seed: int) -> torch.nn.Module:
    net = mlp(12, 24, 24, 6, seed=seed)
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(net(X), Y).backward()
        adam.step()
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def nets() -> list[torch.nn.Module]:
    return [trained(k) for k in range(3)]


def height(values: np.ndarray) -> float:
    return float(values.max() - min(values[0], values[-1]))


@pytest.mark.parametrize("kind", ["line", "chain", "bezier", "wild"])
def test_finds_the_maxima_of_a_dense_grid(nets, kind):
    a, b, c = nets
    wild = {k: 5 * v for k, v in c.state_dict().items()}
    path = {
        "line": mc.Line(a, b),
        "chain": mc.PolyChain([a, c, b]),
        "bezier": mc.Bezier([a, c, b]),
        "wild": mc.Bezier([a, wild, b]),
    }[kind]
    dense = mc.evaluate(a, path, (X, Y), points=601)
    found = mc.evaluate(a, path, (X, Y), points="adaptive")
    assert len(found.t) <= MOST + 20
    assert np.all(np.diff(found.t) > 0) and {0.0, 1.0} <= set(found.t)
    exact = mc.evaluate(a, path, (X, Y), points=found.t)
    for name in ("loss", "error"):
        most = GOAL.least(height(dense.metric(name)))
        assert found.metric(name).max() >= dense.metric(name).max() - most
        assert found.barrier(name) >= dense.barrier(name) - most
        # passes over some points may sum in another order
        np.testing.assert_allclose(found.metric(name), exact.metric(name), rtol=1e-5)


def test_says_what_it_did(nets):
    found = mc.evaluate(nets[0], mc.Line(*nets[:2]), (X, Y), "adaptive", tolerance=0.05)
    assert found.samples == N and found.passes >= 2
    assert found.info["points"] == "adaptive" and found.info["tolerance"] == 0.05
    assert found.info["samples of the parts"] == "120, 120"
    assert str(found.info["rule"]).startswith("two parts of 120 samples")
    assert "loss: settled" in str(found.info["stopped"])
    assert found.barrier().found == found.info["rule"]
    assert mc.evaluate(nets[0], mc.Line(*nets[:2]), (X, Y), 3).barrier().found == (
        "largest of 3 points"
    )


def test_results_go_everywhere(nets, tmp_path):
    found = mc.evaluate(nets[0], mc.Line(*nets[:2]), (X, Y), "adaptive")
    for file in (tmp_path / "r.npz", tmp_path / "r.json"):
        found.save(file)
        again = mc.PathResult.load(file)
        assert np.array_equal(again.t, found.t) and again.info == found.info
        assert again.barrier("error") == found.barrier("error")
    assert list(found.to_frame().t) == found.t.tolist()
    assert "loss" in found.terminal_plot() and found.plot() is not None


def test_several_data_sets_share_their_points(nets):
    data = {"train": (X, Y), "test": (X[:700], Y[:700])}
    found = mc.evaluate(nets[0], mc.Line(*nets[:2]), data, "adaptive", metrics=("loss",))
    assert np.array_equal(found["train"].t, found["test"].t)
    assert found["test"].samples == 700


def test_a_callable_is_searched_too(nets):
    def margin(outputs, targets):
        return (outputs.gather(1, targets[:, None])[:, 0] - outputs.mean(1)).neg()

    path = mc.Line(*nets[:2])
    dense = mc.evaluate(nets[0], path, (X, Y), 401, metrics=(margin,))
    found = mc.evaluate(nets[0], path, (X, Y), "adaptive", metrics=(margin,))
    most = GOAL.least(height(dense.margin))
    assert found.margin.max() >= dense.margin.max() - most


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X, Y)


def test_data_that_cannot_be_sampled_take_a_guided_search(nets):
    path = mc.Line(*nets[:2])
    dense = mc.evaluate(nets[0], path, (X, Y), 401)
    found = mc.evaluate(nets[0], path, DataLoader(Stream(), 400), "adaptive")
    assert str(found.info["rule"]).startswith("guided search from 9 points")
    assert found.loss.max() >= dense.loss.max() - GOAL.least(height(dense.loss))


def test_parts_are_disjoint_and_of_every_kind_of_data():
    pairs = (X, Y), TensorDataset(X, Y), {"x": X, "labels": Y}, (X.numpy(), Y.numpy())
    rows = {tuple(row.tolist()): k for k, row in enumerate(X)}
    for data in (*pairs, DataLoader(TensorDataset(X, Y), 7, shuffle=True)):
        parts = parts_of(data)
        seen: list[int] = []
        for part in parts:
            inputs, targets = part[0] if isinstance(part, list) else part
            inputs = inputs["x"] if isinstance(inputs, dict) else inputs
            places = [rows[tuple(torch.as_tensor(row).tolist())] for row in inputs]
            assert torch.equal(torch.as_tensor(targets), Y[places])
            seen += places
        assert len(seen) == len(set(seen)) == 240
    assert parts_of((X[:300], Y[:300])) is None and parts_of(DataLoader(Stream(), 4)) is None


def test_break_points_alone_where_the_plan_shows_that_they_are_enough(nets):
    a = nets[0].state_dict()
    last = [k for k in a if k.startswith("4.")]
    swung = {k: v + torch.randn_like(v) if k in last else v for k, v in a.items()}
    dead = {k: v.clone() for k, v in a.items()}
    dead["4.weight"][:, :5] = 0
    rewritten = {k: v.clone() for k, v in dead.items()}
    rewritten["2.weight"][:5] += 3
    swing = mc.PolyChain([a, swung, dead])
    found = mc.evaluate(nets[0], swing, (X, Y), "adaptive", metrics=("loss",))
    assert found.t.tolist() == [0, 0.5, 1] and "exact" in str(found.info["stopped"])
    dense = mc.evaluate(nets[0], swing, (X, Y), 301, metrics=("loss",))
    assert found.loss.max() >= dense.loss.max()
    # the error is not convex, so that it is searched for; nor is a Bézier curve's loss
    assert "error: settled" in str(mc.evaluate(nets[0], swing, (X, Y), "adaptive").info["stopped"])
    constant = mc.evaluate(nets[0], mc.Line(dead, rewritten), (X, Y), "adaptive")
    assert constant.t.tolist() == [0, 1]
    bend = mc.evaluate(nets[0], mc.Bezier([a, swung, dead]), (X, Y), "adaptive", metrics=("loss",))
    assert "exact" not in str(bend.info["stopped"])


def test_norms_are_recomputed_on_the_parts_as_well():
    net = torch.nn.Sequential(
        torch.nn.Linear(12, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 6)
    )
    other = {k: v + 1 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    path = mc.Line(net, other)
    found = mc.evaluate(net, path, (X, Y), "adaptive", buffers="recompute")
    dense = mc.evaluate(net, path, (X, Y), 101, buffers="recompute")
    assert found.loss.max() >= dense.loss.max() - GOAL.least(height(dense.loss))


def test_infinite_values_end_the_search(nets):
    huge = {k: v * 1e30 for k, v in nets[0].state_dict().items()}
    with pytest.warns(RuntimeWarning, match="not finite"):
        found = mc.evaluate(nets[0], mc.Bezier([nets[0], huge, nets[1]]), (X, Y), "adaptive")
    assert not np.isfinite(found.loss.max()) and "not finite" in str(found.info["stopped"])


@pytest.mark.parametrize(
    "points, more, message",
    [
        ("adaptive", {"resume": "file"}, "resume goes with points that are known beforehand"),
        ("adaptive", {"tolerance": 0}, "tolerance is 0: expected a number above 0"),
        ("adaptive", {"floor": float("nan")}, "floor is nan"),
        ("dense", {}, "points must be a count"),
    ],
)
def test_bad_arguments(nets, points, more, message):
    with pytest.raises(mc.ModeconnError, match=message):
        mc.evaluate(nets[0], mc.Line(*nets[:2]), (X, Y), points, **more)


def test_planes_and_mixtures_are_refused(nets):
    for path in (mc.Plane.through(*nets), mc.Mixture(nets), mc.Mixture(nets[:1])):
        with pytest.raises(mc.ModeconnError, match="expected a path in one parameter"):
            mc.evaluate(nets[0], path, (X, Y), "adaptive")
    with pytest.raises(mc.ModeconnError, match="only once"):
        mc.evaluate(nets[0], mc.Line(*nets[:2]), iter([(X, Y)]), "adaptive")


# -- the rules, on curves that are formulas --------------------------------------------------------


def largest(search, curve) -> tuple[float, int]:
    t = np.zeros(0)
    while True:
        new = np.setdiff1d(search.propose(Known(t, curve(t))), t)
        if not len(new):
            return float(curve(t).max()), len(t)
        if isinstance(search, PartsSearch):
            search.budget.asked += len(new)
        t = np.union1d(t, new)


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4),
    heights=st.lists(st.floats(0.1, 3.0), min_size=4, max_size=4),
    width=st.floats(0.08, 0.4),
    noise=st.floats(0.0, 0.05),
)
def test_humps_are_found(places, heights, width, noise):
    def curve(t):
        humps = [h * np.exp(-(((t - p) / width) ** 2)) for p, h in zip(places, heights)]
        return np.sum(humps, axis=0)

    grid = np.linspace(0, 1, 101)
    wave = noise * np.sin(7 * grid)
    search = PartsSearch(grid, curve(grid) + wave, curve(grid) - wave, GOAL, Budget())
    truth = curve(np.linspace(0, 1, 4001))
    top, count = largest(search, curve)
    assert top >= truth.max() - GOAL.least(height(truth)) and count <= MOST + 8
    assert search.stopped


def test_the_cap_is_reported():
    rough = np.random.default_rng(0).normal(size=101)
    grid = np.linspace(0, 1, 101)
    search = PartsSearch(grid, 5 * rough, -5 * rough, GOAL, Budget())
    largest(search, lambda t: np.sin(40 * t))
    assert search.stopped.startswith("after ") and search.stopped.endswith(" points")


def test_guided_search_meets_a_narrow_hump_beside_a_wide_one():
    def curve(t):
        return np.exp(-(((t - 0.3) / 0.2) ** 2)) + 1.5 * np.exp(-(((t - 0.77) / 0.06) ** 2))

    top, count = largest(GuidedSearch(np.array([0.0, 1.0]), GOAL), curve)
    assert top >= curve(np.linspace(0, 1, 4001)).max() - 0.02 and count <= 40


def test_break_points_are_asked_for_once():
    search = BreakPoints(np.array([0.0, 0.5, 1.0]))
    assert search.propose(Known(np.zeros(0), np.zeros(0))) == [0.0, 0.5, 1.0]
    assert search.propose(Known(np.array([0.0, 0.5, 1.0]), np.zeros(3))) == []
