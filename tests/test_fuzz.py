"""Random networks, paths, data and losses against a plain float64 pass per point (tests/fuzz)."""

from __future__ import annotations

import pytest

from fuzz.check import check
from fuzz.draw import Seeded, Shrinking
from fuzz.grammar import draw_case
from fuzz.run import ways

hypothesis = pytest.importorskip("hypothesis")

# Cases that once gave a wrong number or changed something, with what they have in them.
FOUND = {
    102: "a constant that is multiplied, in a mixture",
    104: "a counter among the buffers",
    110: "a constant that is added, in a plane",
    111: "a literal, in a plane",
    122: "a constant, in float32",
    136: "an operation that changes the input",
    1795850524: "a view of a parameter, which has no input",
    1795867833: "a first layer that writes to its input, in batches of two",
}


@pytest.mark.parametrize("number", FOUND)
def test_what_was_found_stays_mended(number: int):
    for backend, precision in ways():
        check(draw_case(Seeded(number)), backend, precision)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(hypothesis.strategies.data())
def test_drawn_cases(data: object):
    case = draw_case(Shrinking(data))
    hypothesis.note(str(case))
    for backend, precision in ways():
        check(case, backend, precision)
