"""Requested units of convolutions, groups, sums and reductions: each in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from liveness_cases import TOKENS, WIDTH, X, Y, nodes
from naive import clone
from plan_cases import agrees, moved

IMAGES, LABELS = (
    torch.randn(21, 8, 6, 6, generator=torch.Generator().manual_seed(1)),
    torch.arange(21) % 10,
)


def behind(*layers: nn.Module, channels: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, channels, 1),
        *layers,
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(4, 8),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4),
    ],
    ids=["norm", "convolution", "transposed"],
)
def test_groups_are_live_or_dead_as_a_whole(layer):
    model = behind(layer)
    state = clone(model)
    head = f"{len(model) - 1}.weight"
    state[head][:, 2:4] = 0
    state[head][:, 7] = 0  # its group is live
    dead = moved(state, "0.weight", rows=slice(2, 4))
    assert nodes(model, mc.Line(state, dead), IMAGES, "1") == ["constant 6/8"]
    agrees(model, mc.Line(state, dead), IMAGES, LABELS)
    for key in ("0.weight", "1.weight", "1.bias"):
        path = mc.Line(state, moved(state, key))
        assert nodes(model, path, IMAGES, "1")[0].split()[1] == "6/8"
        agrees(model, path, IMAGES, LABELS)
    assert (
        nodes(model, mc.Line(state, moved(state, "0.weight", rows=slice(7, None))), IMAGES, "1")[
            0
        ].split()[0]
        != "constant"
    )


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise_convolutions(multiplier):
    layer = nn.Conv2d(8, 8 * multiplier, 3, padding=1, groups=8, bias=False)
    model = behind(layer, nn.Conv2d(8 * multiplier, 8, 1))
    state = clone(model)
    state["2.weight"][:, : 5 * multiplier] = 0
    path = mc.Line(state, moved(state, "0.weight"))
    assert nodes(model, path, IMAGES, "0") == ["combination 3/8"]
    assert nodes(model, path, IMAGES, "1") == [f"combination {3 * multiplier}/{8 * multiplier}"]
    agrees(model, path, IMAGES, LABELS)


class Skip(nn.Module):
    """relu(x + f(x)), twice: the head reads some channels and the convolutions read others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = (
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.one(x))
        x = torch.relu(x + self.two(x))
        return self.head(x.mean((2, 3)))


def test_what_several_ask_for_is_computed_once():
    """A sum requests the head's channels, a convolution others: one value serves both."""
    model = Skip()
    state, other = clone(model), clone(model)
    for at in (state, other):
        at["head.weight"][:, 5:] = 0
    for key in ("stem.weight", "one.weight", "two.weight", "head.weight"):
        other = moved(other, key)
    other["head.weight"][:, 5:] = 0
    path = mc.Line(state, other)
    plan = mc.explain(model, path, IMAGES, 11)
    steps = [
        step.node
        for step in plan.program.segments[0].steps
        if step.combine is None and step.node.op in ("conv2d", "relu")
    ]
    assert [node.op for node in steps] == ["relu", "conv2d", "relu", "conv2d", "relu"], "each once"
    assert nodes(model, path, IMAGES, "two") == ["varying 5/8"]
    agrees(model, path, IMAGES, LABELS)
    full = mc.explain(
        model, mc.Line(model, moved(moved(clone(model), "stem.weight"), "two.weight")), IMAGES, 11
    )
    assert plan.flops < full.flops


def test_a_branch_that_adds_nothing_to_some_units():
    """x + f(x), with weights and bias of f zero in some units: the sum's other side remains."""
    model = Skip()
    state = clone(model)
    state["one.weight"][3:] = 0
    state["one.bias"][3:] = 0
    agrees(model, mc.Line(state, moved(state, "one.weight", rows=slice(0, 3))), IMAGES, LABELS)
    agrees(model, mc.Line(state, moved(state, "stem.weight")), IMAGES, LABELS)


def test_scales_by_hand_and_reductions():
    """RMS norm written out, a product with a parameter, softmax over another axis, sums."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.scale, self.shift = (
                nn.Parameter(torch.rand(WIDTH)),
                nn.Parameter(torch.rand(1, TOKENS, WIDTH)),
            )
            self.inner, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.shift + x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale
            y = self.inner(x).softmax(1).unsqueeze(1)
            return self.head(torch.cat([y[..., 1:6:2], y[..., :5]], -1).squeeze(1).amax(1))

    model = Written()
    state = clone(model)
    state["inner.weight"][:, 7:] = 0
    state["head.weight"][:, 3:] = 0  # what is left are units 1, 3 and 5 of `inner`
    path = mc.Line(state, moved(state, "scale"))
    assert nodes(model, path, X, "inner") == ["combination 4/8"], (
        "one unit is kept of the part that nobody reads"
    )
    agrees(model, path, X, Y)
    for key in ("shift", "inner.weight", "head.weight"):
        agrees(model, mc.Line(state, moved(state, key)), X, Y)


def test_a_squeeze_of_an_axis_that_has_one_unit_left():
    class Squeezes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x).squeeze(2).squeeze(-1).sum(1))

    model = Squeezes()
    state = clone(model)
    state["head.weight"][:, 1:] = 0
    agrees(model, mc.Line(state, moved(state, "inner.weight")), X, Y)
