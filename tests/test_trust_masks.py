"""Masks of -inf, saved or not, in a buffer or made in forward: never scaled, never added up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from refused import refused

X = torch.randn(10, 4, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(10) % 2
MINUS = float("-inf")


class Masked(nn.Module):
    """Attention with scores that are linear in the weights, and a class that is ruled out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.queries, self.out, self.kind = nn.Linear(6, 6), nn.Linear(6, 3), kind
        later, third = torch.full((4, 4), MINUS).triu(1), torch.tensor([0.0, 0.0, MINUS])
        if kind in ("saved", "not saved"):
            self.register_buffer("later", later, persistent=kind == "saved")
            self.register_buffer("third", third, persistent=kind == "saved")
        elif kind == "attribute":
            self.later, self.third = later, third

    def forward(self, x: Tensor) -> Tensor:
        scores = self.queries(x) @ x.transpose(1, 2)
        if self.kind == "made":
            scores = scores + torch.full((4, 4), MINUS, dtype=x.dtype).triu(1)
            weights = scores.softmax(-1)
            logits = self.out((weights @ x).mean(1))
            return logits.masked_fill(torch.tensor([False, False, True]), MINUS)
        weights = (scores + self.later).softmax(-1)
        return self.out((weights @ x).mean(1)) + self.third


def made(kind: str, count: int) -> list[Masked]:
    networks = []
    for seed in range(count):
        torch.manual_seed(seed)
        networks.append(Masked(kind))
    return networks


@pytest.mark.parametrize("kind", ["saved", "not saved", "attribute", "made"])
def test_masks_are_the_same_at_every_point(kind: str):
    a, b, c, d = made(kind, 4)
    cases: list[tuple[mc.Path, list[object]]] = [
        (mc.Line(a, b), [0.0, 0.3, 1.0, -2.0]),
        (mc.Bezier([a, b, c]), [0.4]),
        (mc.Plane.random(a), [(0.5, -0.3)]),
        (mc.Plane.random(a.state_dict(), biases=True), [(0.5, -0.3)]),
        (mc.Plane.through(a, b, c), [(0.5, 0.7)]),
        (mc.Plane.trajectory([a, b, c, d]), [(0.5, 0.2)]),
        (mc.Mixture([a, b]), [(0.5, 0.5), (-1.0, 0.2), (0.0, 0.0)]),
    ]
    for path, points in cases:
        expected = []
        for t in points:
            network = made(kind, 1)[0].double()
            network.load_state_dict(path.at([t]))
            expected.append(float(F.cross_entropy(network.eval()(X.double()), Y).detach()))
        for backend in ("auto", "reference"):
            options = {"precision": "float64", "backend": backend, "progress": False}
            result = mc.evaluate(a, path, (X, Y), points, **options)
            assert result.info["fallback"] == ""
            assert result.loss == pytest.approx(expected, rel=1e-6)


def test_infinite_weights_and_masks_that_differ_are_refused():
    a, b = (network.state_dict() for network in made("saved", 2))
    b["later"] = torch.zeros(4, 4)
    with refused("control point 0: weights must be finite", "'later'", "alike in all"):
        mc.Line(a, b)
    a, b = (network.state_dict() for network in made("saved", 2))
    a["out.bias"] = torch.tensor([0.0, float("inf"), 0.0])
    with refused("control point 0: weights must be finite", "'out.bias'"):
        mc.Line(a, b)
    a["later"][0, 0] = b["later"][0, 0] = float("nan")
    with refused("'later' has 1 NaN"):
        mc.Line(a, b)
