"""Exact errors along segments of affine logits, against rational brute force and sampling."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modeconn.connection.swing import (
    Intervals,
    StepFunction,
    SwingError,
    correct,
    correct_intervals,
)
from modeconn.errors import ModeconnError

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def is_correct(start: list[float], stop: list[float], label: int, t: Fraction) -> bool:
    """Whether the label is the first maximum at t, in exact arithmetic."""
    z = [(1 - t) * Fraction(a) + t * Fraction(b) for a, b in zip(start, stop)]
    return all(z[label] > v if c < label else z[label] >= v for c, v in enumerate(z))


def contain(intervals: Intervals, t: float) -> np.ndarray:
    """bool [N]: which intervals hold t."""
    after = (intervals.left < t) | ((intervals.left == t) & intervals.left_closed)
    before = (intervals.right > t) | ((intervals.right == t) & intervals.right_closed)
    return after & before


def error_of(start: Tensor, stop: Tensor, labels: Tensor) -> StepFunction:
    swing = SwingError()
    swing.add(start, stop, labels)
    return swing.finish()


def brute(start: Tensor, stop: Tensor, labels: Tensor, t: Fraction) -> float:
    rows = zip(start.tolist(), stop.tolist(), labels.tolist())
    return 1 - sum(is_correct(a, b, y, t) for a, b, y in rows) / len(labels)


# Few different values, so that ties, crossings at the same t and crossings at the ends are common.
small = st.integers(-3, 3).map(float)


@st.composite
def samples(draw, classes=(1, 4), value=small):
    c, n = draw(st.integers(*classes)), draw(st.integers(1, 5))
    rows = st.lists(st.lists(value, min_size=c, max_size=c), min_size=n, max_size=n)
    labels = draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    return torch.tensor(draw(rows)), torch.tensor(draw(rows)), torch.tensor(labels)


@given(samples())
def test_the_step_function_is_that_of_exact_arithmetic(sample):
    start, stop, labels = sample
    steps = error_of(start, stop, labels)
    # Every crossing is a ratio of integers up to 12, and between two of them nothing changes.
    crossings = sorted({Fraction(p, q) for q in range(1, 13) for p in range(q + 1)})
    for t in crossings:
        at = steps.t[np.abs(steps.t - float(t)).argmin()]  # a third is a third only to rounding
        got = steps(at) if abs(at - float(t)) < 1e-12 else steps(float(t))
        assert got == pytest.approx(brute(start, stop, labels, t), abs=1e-12)
    for one, other in pairwise(crossings):
        middle = (one + other) / 2
        assert steps(float(middle)) == pytest.approx(brute(start, stop, labels, middle), abs=1e-12)
    exact = [brute(start, stop, labels, t) for t in crossings]
    exact += [brute(start, stop, labels, (one + other) / 2) for one, other in pairwise(crossings)]
    assert steps.maximum == pytest.approx(max(exact), abs=1e-12)
    assert steps(steps.argmax) == steps.maximum


@given(samples(classes=(2, 10), value=st.floats(-100, 100, width=32)))
def test_the_ends_are_those_of_argmax(sample):
    start, stop, labels = sample
    steps = error_of(start, stop, labels)
    assert steps.at_points[0] == pytest.approx(
        float((start.argmax(1) != labels).double().mean()), abs=1e-12
    )
    assert steps.at_points[-1] == pytest.approx(
        float((stop.argmax(1) != labels).double().mean()), abs=1e-12
    )


def random_logits(n: int, c: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    start, stop = (torch.randn(n, c, generator=generator, dtype=torch.float64) for _ in range(2))
    return start, stop, torch.randint(c, (n,), generator=generator)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_dense_sampling_never_exceeds_and_reaches_the_maximum(classes):
    start, stop, labels = random_logits(300, classes, seed=classes)
    steps = error_of(start, stop, labels)
    t = np.random.default_rng(0).random(2000)
    z = torch.lerp(start[None], stop[None], torch.from_numpy(t)[:, None, None])
    sampled = (z.argmax(2) != labels).double().mean(1).numpy()
    np.testing.assert_allclose(steps(t), sampled, atol=1e-12)
    assert sampled.max() <= steps.maximum
    z = torch.lerp(start, stop, steps.argmax)
    assert float((z.argmax(1) != labels).double().mean()) == pytest.approx(steps.maximum)


def test_the_error_can_peak_or_vanish_inside():
    # Wrong at both ends, by another class each, and right in between; and the other way round for a
    # chord through a rival.
    start, stop = torch.tensor([[0.0, 1.0, -3.0]]), torch.tensor([[0.0, -3.0, 1.0]])
    steps = error_of(start, stop, torch.tensor([0]))
    np.testing.assert_allclose(steps.t, [0, 0.25, 0.75, 1])
    np.testing.assert_array_equal(steps.between, [1, 0, 1])
    # the label comes first: it wins a tie
    np.testing.assert_array_equal(steps.at_points, [1, 0, 0, 1])
    both = error_of(
        torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[0, 2.0], [0.5, 0]]), torch.tensor([0, 0])
    )
    np.testing.assert_allclose(both.t, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(both.between, [0.5, 1, 0.5])
    assert both.maximum == 1
    assert both.argmax == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("label", "at_points", "between"),
    [(0, [0.0, 0.0], [0.0]), (1, [1.0, 1.0], [1.0])],
)
def test_equal_logits_leave_the_first_class(label, at_points, between):
    z = torch.zeros(1, 2)
    steps = error_of(z, z, torch.tensor([label]))
    np.testing.assert_array_equal(steps.at_points, at_points)
    np.testing.assert_array_equal(steps.between, between)


def test_ties_at_an_end_alone():
    tie, first, second = (torch.tensor([row]) for row in ([1.0, 1], [1.0, 0], [0.0, 1]))
    for start, stop, label, at_points, between in [
        (tie, first, 0, [0, 0], [0]),
        (tie, second, 0, [0, 1], [1]),
        (tie, second, 1, [1, 0], [0]),
        (second, tie, 0, [1, 0], [1]),
        (second, tie, 1, [0, 1], [0]),
    ]:
        steps = error_of(start, stop, torch.tensor([label]))
        np.testing.assert_array_equal(steps.at_points, at_points)
        np.testing.assert_array_equal(steps.between, between)


def test_a_crossing_next_to_an_end_is_not_moved_onto_it():
    # g(0) = 1e-300 > 0, g(1) = -1e300: right at 0, wrong at every t that float64 has after it.
    start = torch.tensor([[1e-300, 0.0], [-1e-300, 0]], dtype=torch.float64)
    stop = torch.tensor([[-1e300, 0.0], [1e300, 0]], dtype=torch.float64)
    steps = error_of(start, stop, torch.tensor([0, 0]))
    assert steps.at_points[0] == 0.5
    assert steps.at_points[-1] == 0.5
    intervals = correct_intervals(start, stop, torch.tensor([0, 0]))
    assert contain(intervals, 0.0).tolist() == [True, False]
    assert contain(intervals, 1.0).tolist() == [False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("end", [0, 1])
def test_a_sample_that_is_not_finite_is_wrong_everywhere(bad, end):
    ends = [torch.tensor([[5.0, 0, 0], [5, 0, 0]]) for _ in range(2)]
    ends[end][0, 0 if bad != float("-inf") else 1] = bad
    steps = error_of(*ends, torch.tensor([0, 0]))
    np.testing.assert_array_equal(steps.at_points, 0.5)
    np.testing.assert_array_equal(steps.between, 0.5)
    assert correct(ends[end], torch.tensor([0, 0])).tolist() == [False, True]


def test_batches_add_up_in_any_order():
    start, stop, labels = random_logits(101, 4, seed=1)
    whole = error_of(start, stop, labels)
    swing = SwingError()
    for i in (2, 0, 1):
        for rows in range(i, 101, 3):
            swing.add(start[rows : rows + 1], stop[rows : rows + 1], labels[rows : rows + 1])
    merged = swing.finish()
    assert swing.samples == 101
    for name in ("t", "at_points", "between"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


def test_only_samples_that_are_wrong_somewhere_are_kept():
    start, stop = torch.eye(4).repeat(25, 1) * 3, torch.eye(4).repeat(25, 1) * 2
    labels = torch.arange(4).repeat(25)
    labels[0] = 1
    swing = SwingError()
    swing.add(start, stop, labels)
    assert sum(map(len, swing._parts)) == 1
    assert swing.finish().maximum == 0.01


def test_no_samples_and_bad_shapes():
    empty = SwingError()
    empty.add(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ModeconnError, match="at least one sample"):
        empty.finish()
    with pytest.raises(ModeconnError, match=r"\[2, 3\] and \[2, 4\], labels \[2\]"):
        empty.add(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ModeconnError, match="outside"):
        error_of(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))(1.5)
