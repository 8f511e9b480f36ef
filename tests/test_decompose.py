"""Exported programs that are not traced a second time: the same graph as if they were."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.capture import decompose, export
from modeconn.capture.graph import Graph
from modeconn.capture.quiet import quietly
from plan_networks import CASES, networks


def text_of(graph: Graph) -> list[str]:
    """The operations with what they read; copies that only a layout needs are passed over."""
    copied = {node.id: node.inputs[0] for node in graph.nodes if node.op == "clone" and node.inputs}
    names: dict[int, str] = {}
    lines = []
    for node in graph.nodes:
        if node.id in copied:
            names[node.id] = names[copied[node.id]]
            continue
        inputs = [names[i] for i in node.inputs]
        names[node.id] = name = f"{node.op}{len(lines)}"
        lines.append(f"{name} {node.arguments} {node.entries} {node.shape} {node.source} {inputs}")
    return [re.sub(r"of=<.*?>, ", "", line) for line in lines]


def both(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[Graph, Graph, int]:
    """The graph of a module, that by way of `run_decompositions`, and the calls of it before."""
    calls = 0
    again = torch.export.ExportedProgram.run_decompositions

    def counted(program: torch.export.ExportedProgram, *args: object) -> object:
        nonlocal calls
        calls += 1
        return again(program, *args)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    first, before = export._export(model, x), calls
    monkeypatch.setattr(decompose, "_is_kept", lambda fx: False)
    return first, export._export(model, x), before


ONCE = ("mlp_relu", "mlp_batch_norm", "resnet20", "vit", "gpt", "dense", "attention", "sequences")


@pytest.mark.parametrize("name", ONCE)
def test_the_graph_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = networks(case)[0].eval()
    with torch.no_grad(), quietly():
        first, second, calls = both(model, case.inputs(torch.Generator()), monkeypatch)
    assert text_of(first) == text_of(second)
    assert calls == (name == "vit")  # chunk is taken apart


class Changing(nn.Module):
    """What has to be decomposed: values and buffers changed in place, norms in training mode."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("count", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.kind == "value":
            y.relu_()
        elif self.kind == "view":
            y[:, :2].mul_(2.0)
        elif self.kind == "training":
            y = F.dropout(F.batch_norm(y, None, None, training=True), 0.0, training=True)
        elif self.kind == "constant":
            y = y * torch.tensor([1.0, 2, 3, 4, 5, 6])
        return self.norm(y)


@pytest.mark.parametrize("kind", ["value", "view", "training", "constant"])
def test_what_is_not_functional_is_decomposed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Changing(kind).eval(), torch.randn(5, 6)
    with torch.no_grad(), quietly():
        first, second, calls = both(model, x, monkeypatch)
        expected = model(x)
    assert calls == 1
    assert text_of(first) == text_of(second)
    assert export._agrees(first, model, x, expected)
