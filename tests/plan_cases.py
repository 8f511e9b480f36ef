"""Plans and their classes, as the tests of the planner look at them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from naive import clone, mlp, pass_per_point
from policy import assert_within_policy

State = dict[str, Tensor]


def classes(
    model: nn.Module, path: mc.Line | mc.PolyChain, x: Tensor, points: int = 11, segment: int = 0
) -> list[str]:
    """The class of each node on a segment, with its live units where some are dead."""
    plan = mc.explain(model, path, x, points)
    assert plan.program.graph.fallback is None
    rows = plan.nodes(plan.program.segments[segment])
    return [
        row["class"] + ("" if row["units"] in ("all", "none") else " " + row["units"])
        for row in rows
    ]


def agrees(model: nn.Module, path: object, x: Tensor, y: Tensor, points: object = 11) -> None:
    """Pruned, shared and combined or not: the numbers are those of a pass per point."""
    got = mc.evaluate(model, path, (x, y), points)
    plain, exact = (
        pass_per_point(model, path, x, y, got.t, dtype) for dtype in (torch.float32, torch.float64)
    )
    for name in ("loss", "error"):
        assert_within_policy(name, got.values[name], plain[name], exact[name], torch.float32)


def moved(
    state: State, key: str, amount: float = 0.3, rows: slice | Tensor = slice(None), seed: int = 1
) -> State:
    """A copy in which an entry has moved at random, in some rows only."""
    state = clone(state)
    noise = torch.randn(state[key].shape, generator=torch.Generator().manual_seed(seed))
    state[key][rows] += amount * noise[rows]
    return state


X, Y = torch.randn(65, 20, generator=torch.Generator().manual_seed(0)), torch.arange(65) % 10


@pytest.fixture
def model() -> nn.Sequential:
    return mlp(20, 33, 32, 10)
