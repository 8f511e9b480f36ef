"""The native backend against the reference: one program, equal numbers, or a reason."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.backends.native import extension as native
from modeconn.backends.native.partition import straight_steps, subgraphs, whole_subgraph
from modeconn.errors import Unsupported
from modeconn.models import build
from naive import clone, mlp
from native_backend_cases import Y, agrees
from policy import assert_within_policy

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"no C++ extension: {native.reason()}"
)

X = torch.randn(130, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("points", [1, 2, 21, 1000])
def test_lines(precision, points):
    a, b = (mlp(20, 33, 17, 10, seed=k) for k in range(2))
    agrees(a, mc.Line(a, b), X, Y, points, precision)


@pytest.mark.parametrize("rows", [1, 2, 63, 1025])
@pytest.mark.parametrize(
    "widths", [(1, 1, 2), (20, 10), (3, 245, 1, 10), (20, 63, 7, 2), (5, 1025, 3)], ids=str
)
def test_odd_shapes(rows, widths):
    a, b = (mlp(*widths, seed=k) for k in range(2))
    agrees(a, mc.Line(a, b), torch.randn(rows, widths[0]), torch.arange(rows) % widths[-1], 3)


@pytest.mark.parametrize(
    "module",
    [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.LeakyReLU],
    ids=lambda m: m.__name__,
)
def test_activations(module):
    a, b = (mlp(20, 9, 9, 10, activation=module, seed=k) for k in range(2))
    agrees(a, mc.Line(a, b), X, Y, 5)


def test_every_path():
    a, b, c = (mlp(20, 33, 17, 10, seed=k) for k in range(3))
    for path, points in (
        (mc.PolyChain([a, b, c]), 13),
        (mc.Bezier([a, b, c]), 7),
        (mc.Plane.through(a, b, c), 3),
        (mc.Plane.random(a, biases=True), 3),
        (mc.Mixture([a, b, c]), [[1, 0, 0], [0.4, -0.7, 2.0], [0, 0, 0]]),
    ):
        agrees(a, path, X, Y, points)


def test_weights_and_biases_that_vary_apart():
    a = mlp(20, 33, 17, 10)
    for moved in (("2.weight",), ("2.bias",), ("2.bias", "4.weight"), ("0.bias", "2.weight")):
        b = clone(a)
        for key in moved:
            b[key] += 0.3 * torch.randn_like(b[key])
        agrees(a, mc.Line(a, b), X, Y, 7)


def test_dead_units_and_combined_logits():
    a = clone(mlp(20, 33, 32, 10))
    a["4.weight"][:, 16:] = 0
    b, c = clone(a), clone(a)
    b["2.weight"][16:] += 1.0
    c["4.weight"][:, :16] += 0.3
    c["2.weight"][16:] += 1.0
    model = mlp(20, 33, 32, 10)
    agrees(model, mc.PolyChain([a, b, c]), X, Y, 41)
    live = clone(a)
    live["2.weight"][:16] += 0.2
    agrees(model, mc.Line(a, live), X, Y, 7)


def test_linear_layers_without_activation_or_bias():
    torch.manual_seed(0)
    make = lambda: nn.Sequential(
        nn.Linear(20, 8, bias=False), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8), nn.Linear(8, 10)
    )
    a, b = make(), make()
    agrees(a, mc.Line(a, b), X, Y, 5)


def test_top5_and_ties():
    zero = {key: torch.zeros_like(value) for key, value in mlp(20, 8, 10).state_dict().items()}
    a = mlp(20, 8, 10)
    names = ("loss", "error", "top5_error")
    ours, theirs = (
        mc.evaluate(a, mc.Line(zero, a), (X, Y), 3, metrics=names, backend=backend)
        for backend in ("native", "reference")
    )
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)
    np.testing.assert_array_equal(ours.error, theirs.error)
    # ties beyond the first are the backend's choice
    np.testing.assert_array_equal(ours.top5_error[1:], theirs.top5_error[1:])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(20, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.relu(self.inner(x)))


class Gated(nn.Module):
    """An operation that the engine does not have between what it has."""

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x * torch.sigmoid(x.mean(1, keepdim=True)))


def gated(seed: int) -> Gated:
    torch.manual_seed(seed)
    layers = lambda *widths: nn.Sequential(
        *(part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.GELU()))
    )
    return Gated(layers(20, 64, 64), nn.Sequential(layers(64, 64, 64), nn.Linear(64, 10)))


def test_what_has_no_region_says_why_and_runs_by_auto():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(20))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).softmax(1).cumsum(1)

    a, b = Plain(), {"scale": torch.zeros(20)}
    with pytest.raises(
        mc.ModeconnError, match=r'"native" cannot run this: softmax.*; ask for "reference"'
    ):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 5, backend="native")
    assert mc.evaluate(a, mc.Line(a, b), (X, Y), 5).backend == "reference"


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_residual_layers(precision):
    a, b = Residual(), Residual()
    agrees(a, mc.Line(a, b), X, Y, 5, precision)
    program = mc.explain(a, mc.Line(a, b), X, 5).program
    whole_subgraph(program, program.segments[0])  # does not raise
    with pytest.raises(Unsupported, match="does not follow the step before it"):
        straight_steps(program, program.segments[0], "cuda")


@pytest.mark.parametrize("behind", [False, True])
def test_regions_around_what_the_engine_does_not_have(monkeypatch, behind):
    """ "auto" takes linear layers alone only where PyTorch's products are slow."""
    monkeypatch.setattr("modeconn.backends.native.partition.mkl_falls_behind", lambda: behind)
    a, b = gated(0), gated(1)
    program = mc.explain(a, mc.Line(a, b), X, 5).program
    (segment,) = program.segments
    regions = subgraphs(program, segment)
    assert [[layer.op for layer in region.steps.layers] for region in regions] == [
        ["linear"],
        ["linear"] * 3,
    ]
    # a layer alone saves nothing
    assert [region.pays(segment) for region in regions] == [False, behind]
    agrees(a, mc.Line(a, b), X, Y, 5)
    agrees(a, mc.Line(a, b), X, Y, 5, "float64")
    assert mc.evaluate(a, mc.Line(a, b), (X, Y), 5).backend == ("native" if behind else "reference")


def test_regions_of_tokens():
    torch.manual_seed(0)
    make = lambda: build("vit:width=32,layers=2,heads=2,patch=8")
    nets = [make(), make()]
    x = torch.randn(7, 3, 32, 32)
    program = mc.explain(nets[0], mc.Line(*nets), x, 3).program
    regions = subgraphs(program, program.segments[0])
    # the perceptrons
    assert (
        sum([layer.op for layer in region.steps.layers].count("linear") > 1 for region in regions)
        == 2
    )
    agrees(nets[0], mc.Line(*nets), x, Y[:7], 3)


def test_segments_of_both_kinds():
    a = gated(0)
    b, c = clone(a), clone(a)
    b["after.1.weight"] += 0.1  # combined logits: the engine's
    c["before.0.weight"] += 0.1
    path = mc.PolyChain([a, b, c])
    program = mc.explain(a, path, X, 21).program
    whole_subgraph(program, program.segments[0])  # does not raise
    with pytest.raises(Unsupported):
        whole_subgraph(program, program.segments[1])
    agrees(a, path, X, Y, 21)


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_losses_of_rows(loss, precision):
    a, b = (mlp(20, 8, 10, seed=k) for k in range(2))
    target, dtype = torch.rand(130, 10), getattr(torch, precision)
    run = lambda backend, at: mc.evaluate(
        a, mc.Line(a, b), (X, target), 7, loss=loss, backend=backend, precision=at
    )
    ours, plain, exact = (
        run("native", precision),
        run("reference", precision),
        run("reference", "float64"),
    )
    for name in ours.values:
        assert_within_policy(name, ours.values[name], plain.values[name], exact.values[name], dtype)


def test_a_head_that_the_engine_does_not_have():
    a, b = (mlp(20, 8, 10, seed=k) for k in range(2))
    margin = lambda outputs, labels: outputs.gather(1, labels[:, None]).squeeze(1)
    ours, theirs = (
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, loss=margin, backend=n)
        for n in ("native", "reference")
    )
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)


def test_inputs_and_labels_of_any_layout():
    a, b = (mlp(20, 8, 10, seed=k) for k in range(2))
    wide = torch.randn(130, 40)
    wide[:, ::2] = X
    labels = torch.stack([Y, Y], 1)[:, 0]
    path = mc.PolyChain([a, b, {**clone(b), "2.bias": torch.zeros(10)}])
    ours = mc.evaluate(a, path, (wide[:, ::2], labels.int()), 9, backend="native")
    np.testing.assert_allclose(
        ours.loss, mc.evaluate(a, path, (X, Y), 9, backend="reference").loss, rtol=1e-6
    )
