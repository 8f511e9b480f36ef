"""Linear separability: witnesses and proofs in exact rational arithmetic; undecided stays so."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from modeconn.connection import separability
from modeconn.connection.farkas import inequalities, largest_margin, proves_none
from modeconn.connection.separability import Outcome, Separation, coinciding, linear_separability
from modeconn.errors import ModeconnError


def exact_margin(found: Separation, x: Tensor, y: Tensor) -> Fraction:
    """The witness's smallest difference, without rounding."""
    assert found.witness is not None
    U = [[Fraction(v) for v in row] for row in found.witness[0].tolist()]
    c = [Fraction(v) for v in found.witness[1].tolist()]
    worst = []
    for row, own in zip(x.double().tolist(), y.tolist()):
        z = [sum((Fraction(a) * b for a, b in zip(row, u)), k) for u, k in zip(U, c)]
        worst.append(min(z[own] - other for k, other in enumerate(z) if k != own))
    return min(worst)


def assert_witness(found: Separation, x: Tensor, y: Tensor) -> None:
    assert found.separable is True and found.outcome is Outcome.SEPARABLE
    exact = exact_margin(found, x, y)
    assert 0 < Fraction(found.margin) <= exact and float(exact) == pytest.approx(
        found.margin, rel=1e-6, abs=1e-12
    )
    assert torch.cat(
        [found.witness[0], found.witness[1][:, None]], 1
    ).norm().item() == pytest.approx(1.0)


def linear_data(seed: int, samples: int, d: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, d, generator=generator)
    z = x @ torch.randn(d, classes, generator=generator) + torch.randn(classes, generator=generator)
    return x, z.argmax(1)


@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 8), st.integers(2, 5))
def test_what_is_separable_by_construction_is_never_refuted(
    seed: int, samples: int, d: int, classes: int
) -> None:
    x, y = linear_data(seed, samples, d, classes)
    found = linear_separability(x, y, classes=classes)
    assert found.separable is not False
    if found.outcome is Outcome.SEPARABLE:
        assert_witness(found, x, y)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_verdict_agrees_with_a_linear_program(seed: int, classes: int) -> None:
    linprog = pytest.importorskip("scipy.optimize").linprog
    generator = np.random.default_rng(seed)
    # Small whole numbers: points touch, repeat, and lie on lines.
    x, y = generator.integers(-3, 4, (generator.integers(3, 12), 2)).astype(float), None
    y = generator.integers(0, classes, len(x))
    found = linear_separability(x, y, classes=classes, iterations=300)
    rows = inequalities(torch.from_numpy(x), torch.from_numpy(y), classes).numpy()
    feasible = (
        linprog(np.zeros(rows.shape[1]), -rows, -np.ones(len(rows)), bounds=(None, None)).status
        == 0
    )
    assert found.separable in (None, feasible)
    if found.outcome is Outcome.SEPARABLE:
        assert_witness(found, torch.from_numpy(x), torch.from_numpy(y))


def test_exclusive_or() -> None:
    found = linear_separability([[0, 0], [1, 1], [0, 1], [1, 0]], [0, 0, 1, 1])
    assert found.separable is False and found.outcome is Outcome.NOT_SEPARABLE
    assert (
        found.proof == (0, 1)
        and found.margin_at_most == 0
        and np.isnan(found.margin)
        and found.witness is None
    )
    assert "classes 0 and 1 alone" in found.reason


def test_one_wrong_label() -> None:
    x, y = linear_data(3, 400, 6, 4)
    assert linear_separability(x, y).separable is True
    deep = (x @ torch.randn(6, 6)).norm(dim=1).argmin()
    y[deep] = (y[deep] + 1) % 4
    assert linear_separability(x, y).separable is False


def test_far_points_do_not_hide_a_proof() -> None:
    """Three points on a line are inseparable; (5, 5) is right where they do not differ."""
    found = linear_separability([[0.0, 0], [2, 0], [5, 5], [1, 0]], [0, 0, 0, 1])
    assert found.separable is False


def test_three_classes_that_are_separable_in_pairs_only() -> None:
    """Classes along the sides of a triangle and beyond: the pairs' lines meet in no one point."""
    corners = torch.tensor(
        [[np.cos(2 * np.pi * k / 3), np.sin(2 * np.pi * k / 3)] for k in range(3)]
    )
    x = torch.cat(
        [
            torch.stack([corners[k].lerp(corners[(k + 1) % 3], s) for s in (0.1, 1.5)])
            for k in range(3)
        ]
    )
    y = torch.arange(3).repeat_interleave(2)
    for k in range(3):
        assert linear_separability(x[y != k], (y[y != k] == (k + 1) % 3).long()).separable is True
    found = linear_separability(x, y)
    assert found.separable is False and found.proof == () and found.outcome is Outcome.NOT_SEPARABLE


def test_duplicates() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, 3.0], [-0.0, 3.0], [1.0, 2.0], [5.0, 5.0]])
    found = linear_separability(x, torch.tensor([0, 1, 0, 0, 2]))
    assert (
        found.outcome is Outcome.DUPLICATES and found.separable is False and found.proof == (1, 2)
    )
    twice = coinciding(x, torch.tensor([0, 1, 0, 0, 2]))
    assert (twice.repeated, twice.conflicting, twice.example) == (2, 1, (1, 2))
    assert coinciding(x, torch.tensor([0, 1, 1, 0, 2])).conflicting == 0


def test_duplicates_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separability, "_CHUNK", 3)
    x = torch.arange(10.0)[:, None] % 7
    found = coinciding(x, torch.tensor([0] * 8 + [1] * 2))
    assert (found.repeated, found.conflicting, found.example) == (3, 2, (1, 8))


def test_rounding_cannot_fake_a_margin() -> None:
    """A first sample whose numbers add up to nearly 0: the rest is rounding, of either sign."""
    x = torch.tensor([[0.1, 0.2, -0.3], [0.7, 0.1, 0.3]], dtype=torch.float64)
    U = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    c = torch.zeros(2, dtype=torch.float64)
    low = separability._margin(x, y, U, c)
    exact = min(sum(map(Fraction, row)) for row in x.tolist())
    assert Fraction(low) <= exact and low == pytest.approx(float(exact), abs=1e-14)


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_touching_points_are_not_claimed_to_be_apart(seed: int) -> None:
    """Classes an ulp apart along a line: separable exactly, by a margin below the rounding."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, 3, generator=generator, dtype=torch.float64)
    other = torch.nextafter(base, torch.full_like(base, torch.inf))
    found = linear_separability(torch.cat([base, other]), [0, 1], iterations=60)
    assert found.separable is not False
    if found.separable:
        assert_witness(found, torch.cat([base, other]), torch.tensor([0, 1]))


def test_bound_on_the_margin_holds() -> None:
    """Not decided for want of iterations: the bound is above the margin that a witness has."""
    x, y = linear_data(5, 300, 10, 6)
    witness = linear_separability(x, y)
    assert witness.separable is True
    regression = separability._Regression(x, y, 6)
    regression.run(2)
    assert regression.at_most(x) >= witness.margin


def test_a_proof_of_some_rows_is_no_proof_of_the_opposite() -> None:
    rows = torch.tensor([[1.0, 1.0], [2.0, 1.0], [-0.5, 1.0]], dtype=torch.float64)
    assert not proves_none(rows)
    assert proves_none(torch.cat([rows, torch.tensor([[0.0, -1.0]], dtype=torch.float64)]))


def test_linear_program_finds_what_it_is_asked_for() -> None:
    pytest.importorskip("scipy")
    x, y = linear_data(1, 30, 2, 3)
    rows = inequalities(x, y, 3)
    w = largest_margin(rows)
    assert w is not None and bool((rows @ w > 0).all())
    assert largest_margin(torch.cat([rows, -rows])) is None


def test_dead_features_and_absent_classes() -> None:
    x, y = linear_data(2, 100, 4, 3)
    x = torch.cat([x, torch.zeros(100, 2), torch.full((100, 1), 7.0)], 1)
    found = linear_separability(x.view(100, 7, 1), y, classes=5)
    assert found.classes == 5 and found.witness[0].shape == (5, 7)
    assert_witness(found, x, y)
    assert found.radius == pytest.approx(float(x.square().sum(1).max() + 1) ** 0.5)


def test_one_class() -> None:
    found = linear_separability(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    assert (
        found.separable is True
        and found.outcome is Outcome.ONE_CLASS
        and "one class" in found.reason
    )


def test_deterministic() -> None:
    x, y = linear_data(7, 200, 6, 3)
    a, b = linear_separability(x, y), linear_separability(x, y)
    assert torch.equal(a.witness[0], b.witness[0]) and a.margin == b.margin


@pytest.mark.parametrize(
    "x, y, text",
    [
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "at least one sample"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), r"features have shape \[3\]"),
        (torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), r"labels have shape \[2\]"),
        (torch.zeros(3, 2), torch.zeros(3), "expected integers"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), "labels run from -1 to 1"),
        (torch.tensor([[0.0], [torch.nan]]), torch.tensor([0, 1]), "features are not finite"),
    ],
)
def test_bad_input(x: Tensor, y: Tensor, text: str) -> None:
    with pytest.raises(ModeconnError, match=text):
        linear_separability(x, y)


def test_bad_settings() -> None:
    x, y = linear_data(0, 10, 2, 3)
    with pytest.raises(ModeconnError, match="expected class numbers from 0 to 1"):
        linear_separability(x, y, classes=2)
    with pytest.raises(ModeconnError, match="iterations is 0"):
        linear_separability(x, y, iterations=0)
