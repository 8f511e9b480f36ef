"""The planner: each rule in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
import plan_cases
from naive import clone, mlp
from plan_cases import X, Y, agrees, classes, moved

# Fixtures.
model = plan_cases.model


def test_a_line_between_different_networks_combines_the_first_layer_only(model):
    path = mc.Line(model, mlp(20, 33, 32, 10, seed=1))
    assert classes(model, path, X) == ["combination", *["varying"] * 4]
    agrees(model, path, X, Y)


def test_moving_the_last_layer_only_combines_the_logits(model):
    path = mc.Line(model, moved(model.state_dict(), "4.weight"))
    assert classes(model, path, X) == [*["constant"] * 4, "combination"]
    agrees(model, path, X, Y)


def test_moving_a_middle_layer_shares_what_is_below_it(model):
    path = mc.Line(model, moved(model.state_dict(), "2.bias"))
    assert classes(model, path, X) == ["constant", "constant", "combination", "varying", "varying"]
    agrees(model, path, X, Y)


def test_equal_networks_are_constant_all_through(model):
    path = mc.Line(model, clone(model))
    assert set(classes(model, path, X)) == {"constant"}
    agrees(model, path, X, Y)


def test_dead_units_are_not_computed(model):
    state = clone(model)
    state["4.weight"][:, 20:] = 0
    path = mc.Line(state, moved(state, "2.weight", rows=slice(20, None)))
    assert classes(model, path, X) == [
        "constant",
        "constant",
        "constant 20/32",
        "constant 20/32",
        "constant",
    ]
    agrees(model, path, X, Y)


def test_a_unit_that_is_live_at_one_end_is_live(model):
    state = clone(model)
    state["4.weight"][:, 20:] = 0
    other = moved(state, "2.weight", rows=slice(20, None))
    other["4.weight"][3, 25] = 1e-30
    assert classes(model, mc.Line(state, other), X)[2:4] == ["combination 21/32", "varying 21/32"]
    agrees(model, mc.Line(state, other), X, Y)


def test_units_die_through_several_layers(model):
    state = clone(model)
    state["4.weight"][:, 16:] = 0
    state["2.weight"][:16, 11:] = 0  # the live units of layer 2 read 11 of layer 1
    assert classes(model, mc.Line(state, moved(state, "0.weight", rows=slice(11, None))), X) == [
        "constant 11/33",
        "constant 11/33",
        "constant 16/32",
        "constant 16/32",
        "constant",
    ]


def test_an_output_that_nothing_reaches(model):
    state = clone(model)
    state["4.weight"][:] = 0
    path = mc.Line(state, moved(state, "2.weight"))
    assert classes(model, path, X)[2] == "combination 1/32"  # one is kept for its shape
    agrees(model, path, X, Y)


def conv_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(32, 10),
    )


IMAGES = torch.randn(65, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def test_channels_are_units():
    model = conv_net()
    state = clone(model)
    # channel c owns the flattened features [4c, 4c + 4)
    state["9.weight"].view(10, 8, 4)[:, 5:] = 0
    state["4.weight"][:5, 3:] = 0
    dead = moved(state, "4.weight", rows=slice(5, None))
    dead = moved(dead, "0.weight", rows=slice(3, None))
    dead["1.running_mean"][3:] += 1
    got = classes(model, mc.Line(state, dead), IMAGES)
    assert got == [
        *["constant 3/6"] * 4,
        *["constant 5/8"] * 3,
        "constant 20/32",  # flattened; dropout is no operation in eval mode
        "constant",
    ]
    agrees(model, mc.Line(state, dead), IMAGES, Y)


def test_a_channel_with_one_live_feature_is_live():
    model = conv_net()
    state = clone(model)
    state["9.weight"].view(10, 8, 4)[:, 5:] = 0
    state["9.weight"].view(10, 8, 4)[0, 7, 2] = 1.0
    assert (
        classes(model, mc.Line(state, moved(state, "4.weight", rows=slice(5, None))), IMAGES)[4]
        == "combination 6/8"
    )
    agrees(model, mc.Line(state, moved(state, "4.weight", rows=slice(5, None))), IMAGES, Y)


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_linear_operations_carry_a_combination_on():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = (
                nn.Conv2d(2, 6, 3),
                nn.BatchNorm2d(6),
                nn.Linear(6, 10),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            y = y + 0.5 * y - 1.0
            return self.head(torch.cat([y[:, :3], y[:, 3:]], 1).mean((2, 3)))

    model = Linear()
    path = mc.Line(model, moved(model.state_dict(), "conv.weight"))
    assert {name.split()[0] for name in classes(model, path, IMAGES)} == {"combination"}, (
        "the whole curve costs two passes"
    )
    agrees(model, path, IMAGES, Y)
    # Batch norm's scale times the convolution's weight: a product of two things that vary is not
    # linear.
    both = moved(moved(model.state_dict(), "conv.weight"), "norm.weight")
    assert classes(model, mc.Line(model, both), IMAGES)[:2] == ["combination", "varying"]
    agrees(model, mc.Line(model, both), IMAGES, Y)
    # A variance enters through a square root.
    variance = moved(model.state_dict(), "norm.running_var", 0.1)
    assert classes(model, mc.Line(model, variance), IMAGES)[:2] == ["constant", "varying"]
    agrees(model, mc.Line(model, variance), IMAGES, Y)


def test_offsets_need_coefficients_that_add_up_to_one():
    model = nn.Sequential(nn.Linear(20, 8), nn.Linear(8, 10))  # no activation between them
    states = [model.state_dict(), moved(model.state_dict(), "0.weight")]
    assert classes(model, mc.Line(*states), X) == ["combination", "combination"]
    t = [[0.3, 0.9], [1.0, 1.0], [0.2, -0.4]]
    rows = mc.explain(model, mc.Mixture(states), X, t)
    assert [row["class"] for row in rows.nodes(rows.program.segments[0])] == [
        "combination",
        "varying",
    ]
    agrees(model, mc.Mixture(states), X, Y, t)
    agrees(model, mc.Plane.random(model), X, Y, 3)


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.GroupNorm(1, 32)], ids=["layer", "group"])
def test_norms_over_units_keep_all_of_them(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), norm, nn.ReLU(), nn.Linear(32, 10))
    state = clone(model)
    state["3.weight"][:, 16:] = 0
    # dead to the output, but not to the norm
    other = moved(state, "0.weight", rows=slice(16, None))
    assert classes(model, mc.Line(state, other), X)[:2] == ["combination", "varying"]
    agrees(model, mc.Line(state, other), X, Y)
    scaled = moved(moved(state, "1.weight"), "1.bias", seed=2)
    assert classes(model, mc.Line(state, scaled), X)[:2] == ["constant", "combination"]
    agrees(model, mc.Line(state, scaled), X, Y)


def test_residual_branches_and_different_live_units():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer, self.head = (
                nn.Linear(20, 16),
                nn.Linear(16, 20),
                nn.Linear(20, 10),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(x + self.outer(torch.relu(self.inner(x)))))

    torch.manual_seed(0)
    model = Residual()
    state = clone(model)
    state["head.weight"][:, 7:] = 0
    dead = moved(state, "outer.weight", rows=slice(7, None))
    # The input has no units of its own to leave out: the sum takes those that it needs.
    assert classes(model, mc.Line(state, dead), X)[2:5] == ["constant 7/20"] * 3
    agrees(model, mc.Line(state, dead), X, Y)
    path = mc.Line(state, moved(state, "inner.weight"))
    assert classes(model, path, X)[2:5] == ["varying 7/20"] * 3
    agrees(model, path, X, Y)


def test_operations_without_a_rule_run_as_they_are():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(20, 16), nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cumsum(self.layer(x), 1).sort(1).values)

    model = Odd()
    path = mc.Line(model, moved(model.state_dict(), "layer.weight"))
    plan = mc.explain(model, path, X)
    notes = [row["note"] for row in plan.nodes(plan.program.segments[0])]
    assert (
        any("no rule for cumsum" in note for note in notes) and plan.program.graph.fallback is None
    )
    agrees(model, path, X, Y)
    dead = clone(model)
    dead["head.weight"][:, 8:] = 0
    agrees(model, mc.Line(dead, moved(dead, "layer.weight", rows=slice(8, None))), X, Y)


def test_weights_that_are_computed():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(20, 8)), nn.ReLU(), nn.Linear(8, 10)
    )
    key = "0.parametrizations.weight.original0"
    path = mc.Line(model, moved(model.state_dict(), key))
    agrees(model, path, X, Y)
    agrees(model, mc.Line(model, moved(model.state_dict(), "2.weight")), X, Y)


def test_transposed_convolutions_have_units():
    """Their weight is [in, out, …]: dead channels fall away on both sides, the first combines."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(2, 6, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 10),
    )
    state = clone(model)
    state["6.weight"][:, 3:] = 0
    state["2.weight"][2:, :3] = 0  # the live channels of the second read two of the first
    dead = moved(moved(state, "2.weight", rows=slice(None)), "0.bias", rows=slice(2, None))
    dead["2.weight"][:, :3] = state["2.weight"][:, :3]
    got = classes(model, mc.Line(state, dead), IMAGES)
    assert got == [*["constant 2/6"] * 2, *["constant 3/4"] * 4, "constant"]
    agrees(model, mc.Line(state, dead), IMAGES, Y)
    assert classes(model, mc.Line(state, moved(state, "0.weight")), IMAGES)[:2] == [
        "combination 2/6",
        "varying 2/6",
    ]
    agrees(model, mc.Line(state, moved(state, "0.weight")), IMAGES, Y)
    grouped = nn.Sequential(
        nn.ConvTranspose2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10)
    )
    agrees(grouped, mc.Line(grouped, moved(grouped.state_dict(), "0.weight")), IMAGES, Y)


def test_addmm_is_a_linear_layer():
    """As Hugging Face's Conv1D calls it: y = b + x W, with the weight [in, out]."""

    class Conv1D(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            self.weight, self.bias = (
                nn.Parameter(torch.randn(before, after) / 3),
                nn.Parameter(torch.randn(after)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(20, 16), nn.ReLU(), Conv1D(16, 10))
    state = clone(model)
    state["2.weight"][9:] = 0
    assert classes(model, mc.Line(state, moved(state, "2.bias")), X) == [
        *["constant 9/16"] * 2,
        "combination",
    ]
    path = mc.Line(state, moved(state, "0.weight"))
    assert classes(model, path, X) == ["combination 9/16", "varying 9/16", "varying"]
    agrees(model, path, X, Y)
    plan = mc.explain(model, path, X, 11)
    assert plan.program.naive_flops == 2 * 20 * 16 + 16 + 2 * 16 * 10
