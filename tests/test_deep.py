"""Deep networks: nothing in the planner or in a backend calls itself once for each node."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.backends import make_backend
from modeconn.capture.export import capture
from modeconn.capture.graph import Graph, In, Node
from modeconn.metrics import Head
from modeconn.plan.parting import Branch, Parting
from modeconn.plan.planner import make_program
from modeconn.plan.program import Segment
from modeconn.plan.trees import tree_lines
from modeconn.plan.weights import Contents

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 8
POINTS = np.array([0.0, 0.25, 1.0])


class Layer(nn.Module):
    """A piece of a chain [N, 8] → [N, 8]; chains repeat it."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.way = nn.Linear(8, 8), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.linear, x)


PIECES = {
    "plain": lambda linear, x: linear(x).tanh(),
    "residual": lambda linear, x: x + linear(x.relu()),
    "views": lambda linear, x: linear(x.view(-1, 2, 4).transpose(1, 2).flatten(1)).tanh(),
    "activations": lambda linear, x: linear(x).sin().tanh().sin().tanh().sin().tanh(),
    "parts": lambda linear, x: torch.cat([linear(x)[:, 4:].tanh(), x[:, :4].sin()], 1),
    "dead units": lambda linear, x: linear(x).tanh(),
}


def repeated(piece: nn.Module, nodes: int) -> tuple[Graph, int]:
    """The graph of a chain of at least so many nodes, and how many pieces it has."""
    one = capture(piece, X)
    body, count = one.nodes[1:], -(-nodes // (len(one.nodes) - 1))
    assert all(node.op == "input" for node in one.nodes[:1]) and one.tensor_output is not None
    chain, last = [one.nodes[0]], 0
    for number in range(count):
        ids = {0: last}
        for node in body:
            ids[node.id] = len(chain)
            chain.append(_moved(node, ids, number))
        last = ids[one.tensor_output]
    return replace(one, nodes=tuple(chain), output=In(last)), count


def _moved(node: Node, ids: dict[int, int], number: int) -> Node:
    entries = tuple(f"{number}.{name}" for name in node.entries)
    inputs = tuple(ids[i] for i in node.inputs)
    return replace(node, id=ids[node.id], inputs=inputs, entries=entries)


def chain_of(kind: str, nodes: int, *backends: str) -> tuple[list[np.ndarray], np.ndarray]:
    """The losses of a chain along a line, by backends and by a pass per point in float64."""
    torch.manual_seed(0)
    piece = Layer(PIECES[kind]).eval()
    graph, count = repeated(piece, nodes)
    ends = []
    for _ in range(2):
        states = {}
        for number in range(count):
            weight = torch.randn(8, 8) * (0.1 if kind == "residual" else 0.35)
            if kind == "dead units":
                weight[:, 5:] = 0.0
            states[f"{number}.linear.weight"], states[f"{number}.linear.bias"] = (
                weight / (1 + 0.0 * number),
                torch.randn(8) / 8,
            )
        ends.append(states)
    path = mc.Line(*ends)
    program = make_program(
        graph,
        path,
        POINTS,
        dtype=torch.float32,
        device=torch.device("cpu"),
        frozen=frozenset(),
    )
    head = Head("cross_entropy", ("loss",))
    targets = head.fit(torch.empty(4, 8, device="meta"), Y)
    found = []
    for backend in backends:
        engine = make_backend(backend, program, torch.float32, torch.device("cpu"))
        values = engine.shared(X)
        sums = [
            engine.sums(segment, values, targets, head, lambda points=1: None)
            for segment in program.segments
        ]
        found.append(torch.cat(sums)[:, 0].numpy() / len(X))
    return found, np.array([_plain(piece, path.at(t), count) for t in POINTS])


def _plain(piece: nn.Module, state: dict[str, Tensor], count: int) -> float:
    x = X.double()
    for number in range(count):
        weight, bias = (state[f"{number}.linear.{n}"].double() for n in ("weight", "bias"))
        x = piece.way(lambda v, w=weight, b=bias: nn.functional.linear(v, w, b), x)
    return nn.functional.cross_entropy(x, Y).item()


def parted_at_every_layer(layers: int) -> tuple[Branch | None, list[Segment]]:
    """The tree and the segments of points that part at each layer of a chain."""
    graph, count = repeated(Layer(PIECES["plain"]).eval(), 2 * layers)
    names = [name for node in graph.nodes for name in node.entries]
    ends = [{name: torch.full((8,), float(k)) for name in names} for k in range(2)]
    path = mc.Line(*ends, groups=[str(number) for number in range(count)])
    contents = Contents(
        path.control_points, {}, torch.float32, torch.device("cpu"), blocks=path.blocks
    )
    # at each point all layers up to one move
    coefficients = path.coefficients(np.tri(count) / 2).numpy()
    active = tuple(range(2 * count))
    whole = Segment(0, np.arange(count), active, coefficients, blocks=count)
    segments, tree = Parting(graph, contents).parted(whole, {})
    return tree, segments


def from_below(frames: int, call: Callable[[], Any]) -> Any:
    """Calls a function from so many frames down."""
    return call() if frames == 0 else from_below(frames - 1, call)


@pytest.mark.parametrize(
    "kind, backend", [*itertools.product(PIECES, ["reference"]), ("plain", "native")]
)
def test_chains_of_any_length_are_planned_and_run(kind: str, backend: str) -> None:
    (ours,), right = from_below(200, lambda: chain_of(kind, 700, backend))
    np.testing.assert_allclose(ours, right, rtol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PIECES)
def test_chains_of_5000_nodes_are_planned_and_run(kind: str) -> None:
    found, right = from_below(200, lambda: chain_of(kind, 5000, "reference", "auto"))
    for ours in found:
        np.testing.assert_allclose(ours, right, rtol=3e-4)


def test_points_that_part_at_every_layer_of_a_deep_chain() -> None:
    tree, segments = from_below(200, lambda: parted_at_every_layer(500))
    assert tree is not None
    assert sorted(np.concatenate([segment.point_indices for segment in segments])) == [*range(500)]
    assert sum(1 for _ in tree.all()) > 450
    assert len(from_below(200, lambda: tree_lines(tree))) > 900


def test_a_network_of_201_layers_is_evaluated() -> None:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        pairs = [(nn.Linear(8, 8), nn.ReLU()) for _ in range(100)]
        return nn.Sequential(*itertools.chain.from_iterable(pairs), nn.Linear(8, 8)).eval()

    a, b = make(1), make(2)
    result = from_below(200, lambda: mc.evaluate(a, mc.Line(a, b), (X, Y), POINTS))
    assert not result.info["fallback"]
    state = mc.Line(a, b).at(0.25)
    middle = make(3).double()
    middle.load_state_dict({name: value.double() for name, value in state.items()})
    right = nn.functional.cross_entropy(middle(X.double()), Y).item()
    np.testing.assert_allclose(result.loss[1], right, rtol=1e-5)
