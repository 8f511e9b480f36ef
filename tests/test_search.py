"""Searches of mixtures and paths: what they ask, what they find, and how they go on."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

import modeconn as mc
from modeconn.parameters.searching import STRATEGIES, Space
from naive import clone, mlp

X, Y = torch.randn(29, 6, generator=torch.Generator().manual_seed(0)), torch.arange(29) % 3
MODEL = mlp(6, 8, 3)


def mixture(count: int, **options: object) -> mc.Mixture:
    return mc.Mixture([clone(mlp(6, 8, 3, seed=k + 1)) for k in range(count)], **options)


class Sphere:
    """Stands in for the package cmaes: its ask and tell, with a plain evolution strategy."""

    def __init__(self, mean, sigma, bounds, seed, population_size):
        self.mean, self.sigma = mean, sigma
        self.rng, self.bounds = np.random.default_rng(seed), bounds
        self.population_size = population_size or 6

    def ask(self) -> np.ndarray:
        drawn = self.mean + self.sigma * self.rng.normal(size=len(self.mean))
        return np.clip(drawn, *self.bounds.T)

    def tell(self, solutions) -> None:
        assert len(solutions) == self.population_size
        assert all(np.isfinite(score) for _, score in solutions)
        best = sorted(solutions, key=lambda pair: pair[1])[:2]
        self.mean, self.sigma = np.mean([x for x, _ in best], axis=0), 0.8 * self.sigma

    def should_stop(self) -> bool:
        return False


@pytest.fixture
def cmaes(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import cmaes  # noqa: F401
    except ImportError:
        module = types.ModuleType("cmaes")
        module.CMA = Sphere
        monkeypatch.setitem(sys.modules, "cmaes", module)


def scores(rows: np.ndarray) -> np.ndarray:
    return ((rows - np.array([0.7, 0.2, 0.1])) ** 2).sum(1)


@pytest.mark.parametrize("name", [*STRATEGIES])
def test_strategies_keep_to_the_simplex_and_the_budget(name: str, cmaes):
    space = Space.of(mixture(3))
    asking = STRATEGIES[name](space, 40, None, 0)
    seen, answer = [], None
    while True:
        try:
            rows = next(asking) if answer is None else asking.send(answer)
        except StopIteration:
            break
        seen.append(rows)
        answer = scores(rows)
    found = np.concatenate(seen)
    assert 0 < len(found) <= 40 and (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1.0)
    if name == "cma":
        assert len(found) == 40
        assert scores(seen[-2]).min() < scores(seen[0]).min() + 1e-9


def test_the_best_of_a_grid_is_that_of_its_evaluation():
    path = mixture(3)
    found = mc.search(MODEL, path, (X, Y), budget=30, strategy="grid")
    assert len(found.t) == 28 and found.passes == 1  # sixths
    plain = mc.evaluate(MODEL, path, (X, Y), found.t)
    np.testing.assert_allclose(found.loss, plain.loss, rtol=1e-6)
    assert found.lowest()[1] == found.loss.min()


def test_a_search_takes_a_batch_of_points_a_pass(cmaes):
    found = mc.search(MODEL, mixture(3), (X, Y), budget=20, strategy="random", batch=8, seed=3)
    assert len(found.t) == 20 and found.passes == 3
    np.testing.assert_allclose(found.t[0], 1 / 3)
    again = mc.search(MODEL, mixture(3), (X, Y), budget=20, strategy="random", batch=8, seed=3)
    assert again.t.tobytes() == found.t.tobytes()
    found = mc.search(MODEL, mixture(3), (X, Y), budget=24, strategy="cma", batch=6)
    assert len(found.t) == 24 and found.passes == 4


def test_a_greedy_search_is_a_greedy_soup():
    path = mixture(4)
    found = mc.search(MODEL, path, (X, Y), budget=10, strategy="greedy")
    assert len(found.t) == 7 and found.loss.min() <= found.loss[:4].min()
    short = mc.search(MODEL, path, (X, Y), budget=5, strategy="greedy")
    assert short.t.tobytes() == found.t[:5].tobytes()


def test_groups_and_lines_are_searched_as_well(cmaes):
    path = mixture(2, groups=["0", "*"])
    for strategy in ("random", "grid", "cma"):
        found = mc.search(MODEL, path, (X, Y), budget=16, strategy=strategy)
        np.testing.assert_allclose(found.t.reshape(-1, 2, 2).sum(2), 1.0)
    line = mc.Line(*path.control_points, groups=["0", "*"])
    found = mc.search(MODEL, line, (X, Y), budget=16, strategy="grid")
    assert len(found.t) == 16 and found.t.min() == 0 and found.t.max() == 1
    found = mc.search(MODEL, mc.Line(*path.control_points), (X, Y), budget=7, metric="error")
    assert found.t.shape == (7,)


def test_a_search_goes_on_where_it_was_interrupted(tmp_path, monkeypatch, cmaes):
    path, file = mixture(3), tmp_path / "search"
    options = {"budget": 24, "strategy": "cma", "batch": 6, "seed": 1}
    whole = mc.search(MODEL, path, (X, Y), **options)
    module = sys.modules["modeconn.evaluation.searches"]
    evaluate, calls = module.evaluate, []

    def interrupted(*args: object, **given: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **given)

    monkeypatch.setattr(module, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mc.search(MODEL, path, (X, Y), resume=file, **options)
    again = mc.search(MODEL, path, (X, Y), resume=file, **options)
    assert len(calls) == 5  # two, the interrupted one, two
    assert again.t.tobytes() == whole.t.tobytes() and again.loss.tobytes() == whole.loss.tobytes()
    assert mc.search(MODEL, path, (X, Y), resume=file, **options).passes == 4 and len(calls) == 5
    assert [each.name for each in tmp_path.iterdir()] == ["search"]
    for change in ({"seed": 2}, {"loss": "mse"}, {"budget": 30}):
        with pytest.raises(mc.ModeconnError, match="another unfinished search"):
            mc.search(MODEL, path, (X, Y), resume=file, **options | change)
    with pytest.raises(mc.ModeconnError, match="other data"):
        mc.search(MODEL, path, (X + 1, Y), resume=file, **options)


def test_what_does_not_fit_is_refused(monkeypatch):
    path = mixture(3)
    for options, words in (
        ({"strategy": "luck"}, "expected one of random, grid, greedy, cma"),
        ({"budget": 0}, "budget"),
        ({"batch": 0}, "batch"),
        ({"strategy": "grid", "budget": 2}, "coarsest grid has 3 points"),
        ({"metric": "accuracy"}, "accuracy"),
    ):
        with pytest.raises(mc.ModeconnError, match=words):
            mc.search(MODEL, path, (X, Y), **{"budget": 9} | options)
    with pytest.raises(mc.ModeconnError, match="Mixture without groups"):
        mc.search(MODEL, mc.Line(*path.control_points[:2]), (X, Y), strategy="greedy")
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(mc.ModeconnError, match=r"pip install .modeconn\[search\]"):
        mc.search(MODEL, path, (X, Y), strategy="cma")
