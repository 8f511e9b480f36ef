"""same_function: what is one function up to rounding, and what is another one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from naive import clone, mlp

X = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
Y = torch.arange(200) % 10


def permuted(model: nn.Sequential) -> dict[str, Tensor]:
    """The network with its hidden units in another order."""
    state, order = clone(model), torch.randperm(33, generator=torch.Generator().manual_seed(1))
    state["0.weight"], state["0.bias"] = state["0.weight"][order], state["0.bias"][order]
    state["2.weight"] = state["2.weight"][:, order]
    return state


def rescaled(model: nn.Sequential) -> dict[str, Tensor]:
    """ReLU's symmetry, in float32: every weight is rounded anew."""
    state, scale = clone(model), torch.rand(33, generator=torch.Generator().manual_seed(2)) + 0.3
    state["0.weight"] *= scale[:, None]
    state["0.bias"] *= scale
    state["2.weight"] /= scale
    return state


def folded() -> tuple[nn.Module, nn.Module]:
    """A batch norm, and the layer that it can become."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 10))
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    one = mlp(20, 33, 10)
    scale = norm.weight.data / (norm.running_var + norm.eps).sqrt()
    one[0].weight.data = model[0].weight.data * scale[:, None]
    one[0].bias.data = (model[0].bias.data - norm.running_mean) * scale + norm.bias.data
    one[2].load_state_dict(model[3].state_dict())
    return model, one


@pytest.mark.parametrize("change", [permuted, rescaled, clone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_function_by_other_weights(change, dtype: torch.dtype):
    model = mlp(20, 33, 10).to(dtype)
    found = mc.same_function(model, change(model), (X, Y), batch_size=64)
    assert found.same and found.samples == 200, str(found)
    assert found.difference < 1e-4 and str(found).startswith("the same function: outputs of 200")


def test_a_folded_norm_is_the_same():
    assert mc.same_function(*folded(), (X, Y)).same


@pytest.mark.parametrize("amount", [1e-4, 1e-2])
def test_another_function_is_found(amount: float):
    model = mlp(20, 33, 10)
    other = copy.deepcopy(model)
    other[2].bias.data[4] += amount
    found = mc.same_function(model, other, (X, Y))
    assert not found.same and found.place == (4,)
    assert found.difference == pytest.approx(amount, rel=0.01)
    assert found.rounding < amount / 10 and str(found).startswith("not the same function")


def test_half_precision_is_judged_by_its_own_rounding():
    model = mlp(20, 33, 10)
    assert mc.same_function(model.to(torch.bfloat16), permuted(model), (X, Y)).same
    rounded = copy.deepcopy(model).float()
    model = mlp(20, 33, 10)
    assert not mc.same_function(model, rounded, (X, Y)).same


class Masks(nn.Module):
    """Logits of which some are huge or infinite, beside one that is small."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        out[:, 0], out[:, 1] = float("-inf"), float("nan")
        return torch.cat([out[:, :8], out[:, 8:9] - 1e9, out[:, 9:] * 1e-6], 1)


def test_huge_values_hide_nothing():
    torch.manual_seed(0)
    model = Masks()
    other = copy.deepcopy(model)
    assert mc.same_function(model, other, (X, Y)).same
    other.layer.bias.data[9] += 1e-3
    found = mc.same_function(model, other, (X, Y))
    assert not found.same and found.place == (9,)
    other = nn.Sequential(copy.deepcopy(model), nn.Hardtanh(-1e30, 1e30))
    assert mc.same_function(model, other, (X, Y)).difference == float("inf")


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.dropout(x, 0.5, training=True)
        return {"features": x, "logits": self.layer(x), "classes": self.layer(x).argmax(1)}


def test_several_outputs_and_noise():
    torch.manual_seed(0)
    model, other = Several(), Several()
    before = torch.get_rng_state()
    assert mc.same_function(model, copy.deepcopy(model), (X, Y)).same
    found = mc.same_function(model, other, (X, Y))
    assert not found.same and found.place[0] in (1, 2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("b", "text"),
    [
        (nn.Linear(20, 9), r"b returns outputs of shape \[\[128, 9\]\] and a \[\[128, 10\]\]"),
        (nn.Linear(19, 10), "the model does not run on inputs of shape"),
        ({"weight": torch.zeros(10, 20)}, "b does not match the model"),
        ("no such file", "no such file"),
    ],
)
def test_what_cannot_be_compared_is_refused(b: object, text: str):
    with pytest.raises(mc.ModeconnError, match=text):
        mc.same_function(nn.Linear(20, 10), b, (X, Y))
