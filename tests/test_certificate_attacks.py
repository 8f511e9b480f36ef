"""Paths made to be certified wrongly: by rounded sums, by overflow, by cancellation."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mutation_cases
from modeconn.connection import measurement
from modeconn.connection.certificate import Certificate
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.segment_kinds import classify_segment
from modeconn.connection.verification import certify
from modeconn.errors import ModeconnError
from modeconn.parameters.paths import PolyChain
from mutation_cases import PlainForward
from naive import mlp

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def plain_engine(monkeypatch):
    monkeypatch.setattr(measurement, "PlannedForward", PlainForward)


@pytest.fixture(scope="module")
def chains() -> dict[tuple[int, ...], tuple[nn.Module, LayerChain]]:
    found = {}
    for widths in ((1, 4, 2, 2), (1, 4, 2), (2, 3, 3, 2), (1, 3, 2, 2)):
        model = mlp(*widths)
        found[widths] = model, LayerChain.of(model, torch.zeros(2, widths[0]))
    return found


def state(*weights: list[list[float]], dtype: torch.dtype = torch.float32) -> State:
    """The weights of an MLP without biases."""
    found = {}
    for i, weight in enumerate(weights):
        found[f"{2 * i}.weight"] = torch.tensor(weight, dtype=dtype)
        found[f"{2 * i}.bias"] = torch.zeros(len(weight), dtype=dtype)
    return found


def certified(
    chains, widths, points: list[State], x: Tensor, y: Tensor, monkeypatch
) -> Certificate:
    model, chain = chains[widths]
    monkeypatch.setattr(mutation_cases, "CHAIN", chain)
    return certify(model, chain, PolyChain(points), (x, y))


# ---------------------------------------------------------------- sums that rounding makes equal

TWINS = [[1.0], [1.0], [1.0], [0.0]]
READ = [[20.0, 20.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([2.0**60, -(2.0**60), 1.0], [2.0**60, -(2.0**60), -1.0]),
        ([1.0, 2.0**-54, 2.0**-54], [1.0, 2.0**-54, 0.0]),
        ([2.0**100, 1.0, -(2.0**100)], [2.0**100, -(2.0**100), 0.0]),
        ([2.0**53, 1.0, 1.0], [2.0**53, 1.0, 2.0]),
    ],
)
def test_sums_of_twins_are_exact(chains, before, after):
    chain = chains[1, 4, 2, 2][1]
    rows = [[[*row, 0.0], [*map(float, np.negative(row)), 0.0]] for row in (before, after)]
    ends = [state(TWINS, row, READ, dtype=torch.float64) for row in rows]
    with pytest.raises(ModeconnError, match=r"layer 2 .*live units move"):
        classify_segment(chain, *ends)
    # The same weights in other places are equal, whatever their sums round to.
    order = [2, 0, 1, 3]
    swapped = copy.deepcopy(ends[0])
    swapped["2.weight"] = swapped["2.weight"][:, order]
    assert classify_segment(chain, ends[0], swapped).kind == "shift"


def test_units_are_no_twins_by_rounding(chains):
    """Two units whose incoming sums round alike are of two classes."""
    chain = chains[1, 4, 2, 2][1]
    rows = [[2.0**60, -(2.0**60), 1.0, 0.0], [2.0**60, -(2.0**60), 2.0, 0.0]]
    ends = [state(TWINS, rows, [w, [0.0, 0.0]]) for w in ([1.0, 0.0], [0.0, 1.0])]
    ends[1]["0.bias"][3] = 1.0  # not the output layer alone
    with pytest.raises(ModeconnError, match="live unit"):
        classify_segment(chain, *ends)


def test_sums_that_overflow_are_refused(chains):
    chain = chains[1, 4, 2, 2][1]
    rows = [[1.5e308, 1.5e308, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    ends = [state(TWINS, row, READ, dtype=torch.float64) for row in (rows, rows[::-1])]
    with pytest.raises(ModeconnError, match="too large to be added"):
        classify_segment(chain, *ends)


# ---------------------------------------------------------------- overflow of dead units


def dead(w1: float, w2: float, mean: float = 0.0) -> State:
    """A network that sorts rows by their larger number, with a dead unit of size w1 and w2."""
    return state(
        [[1.0, 0.0], [0.0, 1.0], [w1, w1]],
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, w2]],
        [[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]],
    )


@pytest.mark.parametrize(
    ("start", "stop", "row"),
    [
        ((1e30, 0.0), (0.0, 1e30), 1.0),  # inside the segment alone
        ((0.0, 0.0), (1e38, 0.0), 10.0),  # in one row alone, the last
        ((0.0, 0.0), (1e20, 1e20), 1.0),  # behind the first layer
        ((-1e20, 0.0), (1e20, 1e20), 1.0),  # where the signs hide it at one end
    ],
)
def test_dead_units_that_may_overflow(chains, start, stop, row, monkeypatch):
    x = torch.full((40, 2), 1e-3)
    x[-1] = row
    points = [dead(*start), dead(*stop)]
    with pytest.raises(ModeconnError, match=r"segment 0 .*may reach .*e\+\d\d"):
        certified(chains, (2, 3, 3, 2), points, x, torch.zeros(40).long(), monkeypatch)
    smaller = [
        {
            key: value * 1e-14 if key in ("0.weight", "2.weight") else value
            for key, value in p.items()
        }
        for p in points
    ]
    assert certified(chains, (2, 3, 3, 2), smaller, x, torch.zeros(40).long(), monkeypatch)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_not_finite(chains, bad, monkeypatch):
    x = torch.ones(40, 2)
    x[-1, 1] = bad
    with pytest.raises(ModeconnError):
        certified(
            chains, (2, 3, 3, 2), [dead(0, 0), dead(1, 1)], x, torch.zeros(40).long(), monkeypatch
        )


# ---------------------------------------------------------------- cancellation


def readouts() -> list[tuple[tuple[int, ...], list[State]]]:
    big, small, more = 3 * 2.0**29, 5 * 2.0**28, 2.0**31
    ones, zeros = [[1.0]] * 4, [0.0] * 4
    hidden = [[2.0**40, -(2.0**40), 1.0], [0.0, 0.0, 0.0]]
    return [
        # at neither end, but inside
        (
            (1, 4, 2),
            [
                state(ones, [[big + small, -big, -small, 20.0], zeros]),
                state(ones, [READ[0] * 2, zeros]),
            ],
        ),
        # at the breakpoints themselves
        (
            (1, 4, 2),
            [
                state(ones, [[more, -20.0, -more, 0.0], zeros]),
                state(ones, [[more, -20.5, -more, 0.0], zeros]),
            ],
        ),
        # in a hidden layer, where float32 finds a unit at zero
        (
            (1, 3, 2, 2),
            [state([[1.0]] * 3, hidden, [[w, 0.0], [0.0, 0.0]]) for w in (20.0, 30.0)],
        ),
    ]


@pytest.mark.parametrize("case", range(3))
def test_float32_stays_below_the_bound_with_its_rounding(chains, case, monkeypatch):
    widths, points = readouts()[case]
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randint(4, (64, 1), generator=generator) / 4 + 1 / 3
    y = torch.zeros(64, dtype=torch.long)
    found = certified(chains, widths, points, x, y, monkeypatch)
    losses = {}
    for dtype in (torch.float32, torch.float64):
        model = copy.deepcopy(chains[widths][0]).to(dtype)
        path = PolyChain([{key: v.to(dtype) for key, v in p.items()} for p in points])
        losses[dtype] = []
        for t in np.linspace(0, 1, 101):
            model.load_state_dict(path.at(float(t)))
            with torch.no_grad():
                losses[dtype].append(F.cross_entropy(model(x.to(dtype)).double(), y).item())
    rounding = found.rounding
    assert max(losses[torch.float32]) <= found.bound + rounding.loss_float32
    assert max(losses[torch.float64]) <= found.bound + rounding.loss_float64
    assert rounding.loss_float64 <= 1e-3 * max(found.bound, 1e-3)
    assert rounding.loss_float32 > 1  # whether or not this order of additions shows it
    if case == 0:  # which a bound without rounding denies
        assert max(losses[torch.float32]) > found.bound + 1


def test_one_row_of_many_is_enough(chains, monkeypatch):
    """A row that cancels is not lost among those that do not."""
    more = 2.0**31
    points = [state([[1.0]] * 4, [[more, -20.0, -more, w], [0.0] * 4]) for w in (0.0, -0.5)]
    x, y = torch.full((400, 1), 2.0**-20), torch.zeros(400, dtype=torch.long)
    x[-1] = 1 + 1 / 3
    found = certified(chains, (1, 4, 2), points, x, y, monkeypatch)
    assert found.rounding.loss_float32 > 100 / 400
