"""Rounding on graphs: norms of convolutions are bounds, and evaluations stay within theirs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from captured_networks import Residual, inputs, network, state_of
from modeconn.connection import lipschitz
from modeconn.connection.captured.structure import CapturedStructure
from modeconn.connection.rounding import PathRounding
from modeconn.connection.segment_kinds import REWRITE, SWING, Evidence

SWUNG, REWRITTEN = (Evidence(kind, (), "") for kind in (SWING, REWRITE))


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 4),
    channels=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    signs=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_norm_of_a_convolution_is_bounded(out, channels, kernel, stride, dilation, signs, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, channels, *kernel, generator=generator, dtype=torch.float64)
    weight = weight if signs else weight.abs()
    basis = torch.eye(channels * 81, dtype=torch.float64).view(-1, channels, 9, 9)
    images = F.conv2d(basis, weight, stride=stride, dilation=dilation, padding=2)
    exact = float(torch.linalg.matrix_norm(images.flatten(1), ord=2))
    bound = lipschitz.of_convolution(weight)
    assert exact <= bound * (1 + 1e-12)
    # Of the whole convolution on a large image there is not much more.
    if stride == 1 and dilation == 1:
        spectrum = torch.fft.fftn(weight, (48, 48), (2, 3)).permute(2, 3, 0, 1)
        assert bound <= 1.15 * float(torch.linalg.matrix_norm(spectrum, ord=2).max())


def rounding_of(
    model: nn.Module, points: list[dict[str, Tensor]], x: Tensor
) -> PathRounding | None:
    evidence = [REWRITTEN if k % 2 else SWUNG for k in range(len(points) - 1)]
    return CapturedStructure.of(model, x[:2]).rounding(points, evidence, len(x), 0.0)


def plain(model: nn.Module, state: dict[str, Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    with torch.no_grad():
        return torch.func.functional_call(model.to(dtype), cast, (x.to(dtype),)).double()


class Small(nn.Module):
    """A block of a residual network that ends in activations of other kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.second = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.hidden, self.behind, self.last = nn.Linear(30, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        h = h + F.silu(self.second(self.inner(h)))
        h = torch.cat([F.max_pool2d(h, 3).flatten(1), h.mean((2, 3))], 1)
        return self.last(torch.tanh(self.behind(self.hidden(h))))


@pytest.mark.parametrize("name", ["small", "residual"])
def test_evaluations_in_float32_are_within_the_bound(name):
    """At the breakpoints, on the swing between them, and where units are dead."""
    torch.manual_seed(0)
    model = (Small() if name == "small" else Residual(blocks=1)).double().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    a = {key: value.detach().clone() for key, value in model.state_dict().items()}
    a["last.weight"][:, :3] = 0
    b = {**a, "last.weight": torch.randn_like(a["last.weight"])}
    x = torch.randn(20, 2, 6, 6, dtype=torch.float64)
    found = rounding_of(model, [a, b, dict(b)], x)
    assert found is not None
    bounds = [each.errors(torch.float32) for each in found.of_rows(x)]
    assert bounds[1] is not bounds[0]
    assert torch.equal(bounds[1], bounds[2])
    for t in (0.0, 0.3, 0.7, 1.0):
        state = {**a, "last.weight": (1 - t) * a["last.weight"] + t * b["last.weight"]}
        off = (plain(model, state, x, torch.float32) - plain(model, state, x, torch.float64)).abs()
        bound = (1 - t) * bounds[0] + t * bounds[1]
        assert bool((off <= bound).all())
        assert float(off.max()) > 0
    assert float(found.of_rows(x)[0].errors(torch.float64).max()) < 1e-9


def test_units_that_are_dead_do_not_count():
    model, x = network("residual"), inputs("residual")
    state = state_of(model)
    dead = {**state, "last.weight": state["last.weight"].clone()}
    dead["last.weight"][:, 2:] = 0
    found = rounding_of(model, [state, dead, dead], x)
    assert found is not None
    whole, part = (float(each.roundoffs.max()) for each in found.of_rows(x)[:2])
    assert part < whole
    large = {key: value.clone() for key, value in dead.items()}
    large["body.3.conv2.weight"][2:] *= 1e3
    large["body.3.bn2.bias"][2:] += 1e3
    again = rounding_of(model, [dead, large, large], x)
    assert again is not None
    assert math.isclose(float(again.of_rows(x)[0].roundoffs.max()), part)


@pytest.mark.parametrize("kind", ["transformer", "unknown"])
def test_nothing_is_said_of_operations_that_are_not_known(kind):
    model, x = network(kind), inputs(kind)
    assert rounding_of(model, [state_of(model)] * 3, x) is None


def test_a_bound_that_says_nothing_is_none():
    """Products of norms grow with the depth and the weights."""
    model = Residual(blocks=2).double().eval()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    state = {k: 99 * v if v.dim() == 4 else v for k, v in model.state_dict().items()}
    assert rounding_of(model, [state] * 3, x) is None


def test_values_added_to_themselves_count_twice():
    class Twice(nn.Module):
        def __init__(self, once: bool) -> None:
            super().__init__()
            self.hidden, self.last, self.once = nn.Linear(4, 5), nn.Linear(5, 2), once

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.hidden(x))
            return self.last(h * 1 if self.once else h + h)

    torch.manual_seed(0)
    x, bounds = torch.randn(3, 4, dtype=torch.float64), []
    for once in (False, True):
        model = Twice(once).double()
        found = rounding_of(model, [state_of(model)] * 2, x)
        bounds.append(found)
    assert bounds[0] is not None
    model = Twice(False).float()
    exact = plain(model, state_of(model), x, torch.float64)
    off = (plain(model, state_of(model), x, torch.float32) - exact).abs()
    assert bool((off <= bounds[0].of_rows(x)[0].errors(torch.float32)).all())
    assert bounds[1] is None  # products with numbers are not known


def test_a_certificate_of_a_graph_has_it():
    model, x = Residual(blocks=1).eval(), torch.randn(30, 2, 6, 6)
    y = torch.arange(30) % 3
    a = {key: value.clone() for key, value in model.state_dict().items()}
    b = {**a, "last.weight": a["last.weight"] + 0.5}
    made = mc.certify(model, mc.PolyChain([a, b]), (x, y))
    rounding = made.certificate.rounding
    assert rounding is not None
    assert 0 < rounding.loss_float64 < 1e-9 < rounding.loss_float32
    losses = mc.evaluate(model, made.path, (x, y), 21, precision="float32").loss
    assert losses.max() <= made.certificate.bound + rounding.loss_float32
    assert mc.verify(model, made, (x, y)) == made.certificate
