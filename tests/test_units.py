"""Parts of a value: what they are in its views, what holds two of them."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modeconn.capture.graph import Size
from modeconn.plan.units import ALL, Units, covering, regrouped

ROWS = Size(lambda rows: rows, "N")

VIEWS = [
    ((24,), (3, 8)),
    ((3, 8), (24,)),
    ((4, 6), (2, 2, 6)),
    ((4, 6), (6, 4)),
    ((2, 3, 4), (6, 4)),
    ((5, 1, 6), (5, 6)),
    ((5, 6), (1, 5, 6, 1)),
    ((2, 3, 4, 5), (6, 20)),
    ((7,), (7,)),
]


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], Units]:
    """Two views, and a part of the second."""
    before, after = draw(st.sampled_from(VIEWS))
    axes = draw(st.sets(st.sampled_from(range(len(after))), max_size=2))
    indices = {
        a: np.array(sorted(draw(st.sets(st.integers(0, after[a] - 1), min_size=1)))) for a in axes
    }
    return before, after, Units(indices).of(after)


def numbers(units: Units, shape: tuple[int, ...]) -> Tensor:
    """The part of 0, 1, 2, … in that shape."""
    whole = torch.arange(int(np.prod(shape))).reshape(shape)
    for axis, index in units.along.items():
        whole = whole.index_select(axis, torch.from_numpy(index))
    return whole


@given(parts())
def test_a_part_covers_a_part_of_its_view(drawn):
    before, after, wanted = drawn
    rows = (ROWS, *before), (ROWS, *after)
    shift = Units({axis + 1: index for axis, index in wanted.along.items()})
    asked = covering(shift, *rows)
    delivered = regrouped(asked, *rows)
    assert delivered is not None, "what is asked for is a part of the view as well"
    asked, delivered = (
        Units({a - 1: index for a, index in units.along.items()}) for units in (asked, delivered)
    )
    got = numbers(asked, before)
    assert torch.equal(got.reshape(-1), numbers(delivered, after).reshape(-1)), (
        "the same numbers in the same order"
    )
    assert set(numbers(wanted, after).reshape(-1).tolist()) <= set(got.reshape(-1).tolist())
    exact = regrouped(wanted, after, before)
    if exact is not None:
        assert asked == exact, "no more than needed, where that can be"


def test_whole_heads():
    heads, features = (ROWS, 5, 3, 4), (ROWS, 5, 12)
    two = Units({2: np.array([0, 2])})
    assert regrouped(two, heads, features) == Units({2: np.array([0, 1, 2, 3, 8, 9, 10, 11])})
    some = Units({2: np.array([3, 9])})
    assert covering(some, heads, features) == Units({2: np.array([0, 2]), 3: np.array([1, 3])}), (
        "units of some heads"
    )
    assert regrouped(some, features, heads) is None
    folded = (Size(lambda rows: 5 * rows, "5*N"), 12)
    assert covering(Units({1: np.array([0])}), folded, features) == ALL, (
        "tokens among the rows are not told apart"
    )


def test_unions_and_positions():
    one, two = Units({1: np.array([1, 3]), 2: np.array([0])}), Units({1: np.array([2])})
    assert one.union(two) == Units({1: np.array([1, 2, 3])}) and one.union(ALL) == ALL
    assert two.within(one.union(two)) == Units({1: np.array([1])})
    assert one.share((ROWS, 4, 5)) == 0.1 and ALL.share((ROWS, 4, 5)) == 1.0
    assert Units({1: np.arange(4)}).of((ROWS, 4)) == ALL
