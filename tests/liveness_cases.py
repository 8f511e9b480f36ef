"""Nodes and costs of a plan, as the tests of requested parts look at them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import modeconn as mc

WIDTH, HEADS, TOKENS = 12, 3, 5
X, Y = (
    torch.randn(33, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)),
    torch.arange(33) % 10,
)


def nodes(model: nn.Module, path: mc.Line, x: Tensor, source: str) -> list[str]:
    """Class and units of the nodes that come from a module."""
    plan = mc.explain(model, path, x, 11)
    assert plan.program.graph.fallback is None
    rows = plan.nodes(plan.program.segments[0])
    return [f"{row['class']} {row['units']}" for row in rows if row["source"].split()[0] == source]
