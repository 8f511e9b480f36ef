"""The native backend against the reference: one program, equal numbers, or a reason."""

from __future__ import annotations

import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.backends.native import extension as native
from modeconn.backends.native.partition import straight_steps, subgraphs, whole_subgraph
from modeconn.errors import Unsupported
from modeconn.models import build
from naive import clone, mlp, pass_per_point
from policy import assert_within_policy

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"no C++ extension: {native.reason()}"
)

X = torch.randn(130, 20, generator=torch.Generator().manual_seed(0))
Y = torch.arange(130) % 10


def agrees(
    model: nn.Module, path: object, x: Tensor, y: Tensor, points: object, precision: str = "float32"
) -> None:
    got = mc.evaluate(model, path, (x, y), points, backend="native", precision=precision)
    dtype = getattr(torch, precision)
    plain, exact = (pass_per_point(model, path, x, y, got.t, d) for d in (dtype, torch.float64))
    for name in ("loss", "error"):
        assert_within_policy(name, got.values[name], plain[name], exact[name], dtype)
    assert got.backend == "native"


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


def conv_net(seed: int, pool: nn.Module | None = None, **conv: object) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 7, (3, 1), **conv),
        nn.Tanh(),  # type: ignore[arg-type]
        pool or nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Dropout(),
        nn.LazyLinear(9),
        nn.ReLU(),
        nn.Linear(9, 10),
    )


IMAGES = torch.randn(67, 2, 12, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "conv",
    [{}, {"padding": 1}, {"stride": 2}, {"stride": (1, 2), "padding": (2, 1)}, {"bias": False}],
    ids=str,
)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_convolutions(conv, precision):
    nets = [conv_net(seed, **conv) for seed in range(2)]
    for net in nets:
        net(IMAGES)
    agrees(nets[0], mc.Line(*nets), IMAGES, Y[:67], 5, precision)


def test_dead_channels():
    nets = [conv_net(seed) for seed in range(2)]
    for net in nets:
        net(IMAGES)
    a, b = (clone(net) for net in nets)
    a["3.weight"][:, 3:] = b["3.weight"][:, 3:] = 0
    features = a["8.weight"].shape[1] // 7
    a["8.weight"][:, 4 * features :] = b["8.weight"][:, 4 * features :] = 0
    agrees(nets[0], mc.Line(a, b), IMAGES, Y[:67], 5)


def norm_net(seed: int, **norm: object) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.BatchNorm2d(5, **norm),
        nn.ReLU(),
        nn.MaxPool2d(2),  # type: ignore[arg-type]
        nn.Conv2d(5, 7, 3, bias=False),
        nn.BatchNorm2d(7),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 9),
        nn.BatchNorm1d(9),
        nn.Linear(9, 10),
    )
    model(IMAGES)  # running statistics of its own
    return model


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"eps": 0.1}], ids=str)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_batch_norms_are_folded(norm, precision):
    nets = [norm_net(seed, **norm) for seed in range(2)]
    agrees(nets[0], mc.Line(*nets), IMAGES, Y[:67], 5, precision)
    agrees(nets[0], mc.PolyChain([*nets, nets[0]]), IMAGES, Y[:67], 9, precision)


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_a_batch_norm_that_alone_moves():
    net = norm_net(0)
    for key in ("1.weight", "1.running_var", "5.running_mean", "10.bias"):
        moved = clone(net)
        moved[key] += 0.5
        got = mc.evaluate(net, mc.Line(net, moved), (IMAGES, Y[:67]), 5)
        exact = pass_per_point(net, mc.Line(net, moved), IMAGES, Y[:67], got.t, torch.float64)
        np.testing.assert_allclose(got.loss, exact["loss"], rtol=2e-6)


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2, dilation=2),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d(2),
    ],
    ids=str,
)
def test_poolings_that_the_engine_does_not_have_are_left_to_the_reference(pool):
    nets = [conv_net(seed, pool) for seed in range(2)]
    for net in nets:
        net(IMAGES)
    path = mc.Line(*nets)
    got = mc.evaluate(nets[0], path, (IMAGES, Y[:67]), 3)
    assert got.backend == "reference"
    np.testing.assert_allclose(
        got.loss,
        pass_per_point(nets[0], path, IMAGES, Y[:67], got.t, torch.float64)["loss"],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    "pool",
    [
        nn.AdaptiveAvgPool2d(1),
        nn.MaxPool2d(3, 2, 1),
        nn.MaxPool2d((2, 1)),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, padding=1),
        nn.AvgPool2d(2),
    ],
    ids=str,
)
def test_poolings(pool):
    nets = [conv_net(seed, pool) for seed in range(2)]
    for net in nets:
        net(IMAGES)
    agrees(nets[0], mc.Line(*nets), IMAGES, Y[:67], 5)


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


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build("resnet20:width=4")
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return model


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_residual_convolutions_run_whole(precision):
    nets = [resnet(seed) for seed in range(2)]
    x = torch.randn(19, 3, 32, 32)
    program = mc.explain(nets[0], mc.Line(*nets), x, 3).program
    whole_subgraph(program, program.segments[0])  # does not raise
    agrees(nets[0], mc.Line(*nets), x, Y[:19], 3, precision)
    half = clone(nets[0])
    half.update(
        {key: value for key, value in clone(nets[1]).items() if key.startswith(("layer3", "fc"))}
    )
    agrees(nets[0], mc.Line(nets[0], half), x, Y[:19], 3, precision)  # the skip is constant


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


@pytest.mark.parametrize(
    "conv",
    [{"groups": 5, "padding": 1}, {"dilation": 2}, {"dilation": (2, 1), "groups": 5}],
    ids=str,
)
def test_grouped_and_dilated_convolutions(conv):
    torch.manual_seed(0)
    make = lambda: nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 10, 3, **conv),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 10),
    )
    a, b = make(), make()
    agrees(a, mc.Line(a, b), IMAGES, Y[:67], 5)
    program = mc.explain(a, mc.Line(a, b), IMAGES, 5).program
    # nothing that a plain chain tells
    with pytest.raises(Unsupported):
        straight_steps(program, program.segments[0], "cuda")


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


class NormFirst(nn.Module):
    """A block of a residual network whose norms come first, or of a dense one."""

    def __init__(self, width: int, out: int, dense: bool) -> None:
        super().__init__()
        self.dense, inner = dense, width if dense else out
        self.norm1, self.conv1 = (
            nn.BatchNorm2d(width),
            nn.Conv2d(width, inner, 1 if dense else 3, padding=1 - dense, bias=False),
        )
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, out, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        return torch.cat([x, y], 1) if self.dense else x + y


def norms_first(seed: int, dense: bool) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = [NormFirst(7 + 5 * i * dense, 5 if dense else 7, dense) for i in range(3)]
    last = 22 if dense else 7
    net = nn.Sequential(
        nn.Conv2d(2, 7, 3, padding=1),
        *blocks,
        nn.BatchNorm2d(last),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(last, 10),
    )
    net(3 * IMAGES + 1)
    return net


def runs_whole(model: nn.Module, path: mc.Line, x: Tensor) -> list[str]:
    """The engine's steps of a line that is one region."""
    program = mc.explain(model, path, x, 5).program
    subgraph = whole_subgraph(program, program.segments[0])
    return [layer.op for layer in subgraph.steps.layers]


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_networks_whose_norms_come_first_run_whole(dense, precision):
    nets = [norms_first(seed, dense) for seed in range(2)]
    steps = runs_whole(nets[0], mc.Line(*nets), IMAGES)
    assert steps.count("affine") == 4 and steps.count("concat") == 3 * dense
    agrees(nets[0], mc.Line(*nets), IMAGES, Y[:67], 5, precision)


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_channels_that_nobody_reads_behind_a_sum_run_whole():
    nets = [resnet(seed) for seed in range(2)]
    a, b = (clone(net) for net in nets)
    a["fc.weight"][:, 3:9] = b["fc.weight"][:, 3:9] = 0
    x = torch.randn(19, 3, 32, 32)
    assert "take" in runs_whole(nets[0], mc.Line(a, b), x)
    agrees(nets[0], mc.Line(a, b), x, Y[:19], 3)


@pytest.mark.parametrize("depth", [16, 17])
def test_a_norm_behind_the_first_layer(depth):
    """A shallow layer is computed again with its norm; else the combination is normalised."""
    torch.manual_seed(0)
    make = lambda: nn.Sequential(
        nn.Linear(2 * depth, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 10)
    )
    a, b = make(), make()
    x = torch.randn(130, 2 * depth)
    for net in (a, b):
        net(x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "batch norms .* interpolated")
        assert runs_whole(a, mc.Line(a, b), x)[0] == ("linear" if depth == 16 else "affine")
        agrees(a, mc.Line(a, b), x, Y, 5)


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
@pytest.mark.parametrize(
    "start",
    [
        (nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8)),
        (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [0, 8])
def test_norms_that_cannot_be_folded(start, length):
    """One behind an activation of the first layer, and one over the axis before the last."""
    x = torch.randn(40, *[length][: length > 0], 8, generator=torch.Generator().manual_seed(1))
    nets = [
        nn.Sequential(*copy.deepcopy(start), nn.Flatten(), nn.Linear(8 * max(1, length), 10))
        for _ in range(2)
    ]
    for seed, net in enumerate(nets):
        torch.manual_seed(seed)
        for layer in net:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        net(3 * x + 1)
    agrees(nets[0], mc.Line(*nets), x, Y[:40], 5)
