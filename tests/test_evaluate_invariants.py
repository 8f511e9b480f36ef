"""Invariants of mc.evaluate: reversals, permutations, splits, batches, the order of t."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import evaluate_cases
import modeconn as mc
from evaluate_cases import X, Y
from naive import clone, mlp

# Fixtures.
nets = evaluate_cases.nets


# -- invariants ------------------------------------------------------------------------------------


def states(seed: int) -> tuple[nn.Sequential, list[dict[str, Tensor]]]:
    model = mlp(20, 13, 9, 10, seed=seed)
    return model, [clone(mlp(20, 13, 9, 10, seed=seed + k)) for k in range(3)]


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), points=st.integers(1, 9))
def test_reversing_a_path_reverses_its_result(seed, points):
    model, (a, b, c) = states(seed)
    for forth, back in (
        (mc.Line(a, b), mc.Line(b, a)),
        (mc.PolyChain([a, b, c]), mc.PolyChain([c, b, a])),
        (mc.Bezier([a, b, c]), mc.Bezier([c, b, a])),
    ):
        t = np.linspace(0, 1, points)
        np.testing.assert_allclose(
            mc.evaluate(model, forth, (X, Y), t).loss,
            mc.evaluate(model, back, (X, Y), 1 - t).loss,
            rtol=2e-6,
        )


@settings(max_examples=8)
@given(seed=st.integers(0, 1000))
def test_permuting_hidden_units_of_both_ends_changes_nothing(seed):
    model, (a, b, _) = states(seed)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))

    def permuted(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            **state,
            "0.weight": state["0.weight"][order],
            "0.bias": state["0.bias"][order],
            "2.weight": state["2.weight"][:, order],
        }

    np.testing.assert_allclose(
        mc.evaluate(model, mc.Line(a, b), (X, Y), 5).loss,
        mc.evaluate(model, mc.Line(permuted(a), permuted(b)), (X, Y), 5).loss,
        rtol=2e-6,
    )


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), cut=st.sampled_from([0.25, 0.5, 0.75]))
def test_splitting_a_segment_changes_nothing(seed, cut):
    model, (a, b, _) = states(seed)
    line = mc.Line(a, b)
    split = mc.PolyChain([a, line.at(cut), b])
    t = np.linspace(0, 1, 9)
    u = np.where(t <= 0.5, 2 * t * cut, cut + (2 * t - 1) * (1 - cut))
    np.testing.assert_allclose(
        mc.evaluate(model, split, (X, Y), t).loss,
        mc.evaluate(model, line, (X, Y), u).loss,
        rtol=5e-6,
    )


@settings(max_examples=10)
@given(batch_size=st.integers(1, 200), budget=st.integers(1, 1 << 20))
def test_batches_do_not_matter(batch_size, budget):
    model, (a, b, _) = states(1)
    whole = mc.evaluate(model, mc.Line(a, b), (X, Y), 3)
    got = mc.evaluate(model, mc.Line(a, b), (X, Y), 3, batch_size=batch_size)
    np.testing.assert_allclose(got.loss, whole.loss, rtol=2e-6)
    np.testing.assert_array_equal(got.error, whole.error)
    got = mc.evaluate(model, mc.Line(a, b), (X, Y), 3, memory_budget=budget)
    np.testing.assert_allclose(got.loss, whole.loss, rtol=2e-6)


@settings(max_examples=10)
@given(t=st.lists(st.floats(-1, 2), min_size=1, max_size=12))
def test_order_and_repetition_of_t_do_not_matter(t):
    model, (a, b, c) = states(2)
    for path in (mc.Line(a, b), mc.PolyChain([a, b, c])):
        got = mc.evaluate(model, path, (X, Y), t)
        assert got.t.tolist() == t
        again = mc.evaluate(model, path, (X, Y), t[::-1] + t)
        np.testing.assert_array_equal(again.loss, np.concatenate([got.loss[::-1], got.loss]))


def test_the_same_call_gives_the_same_bits(nets):
    path = mc.Line(*nets[:2])
    first, second = (mc.evaluate(nets[0], path, (X, Y), 11).loss for _ in range(2))
    np.testing.assert_array_equal(first, second)
