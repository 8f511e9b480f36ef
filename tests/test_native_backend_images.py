"""The native backend on convolutions, norms, poolings and residual networks."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.backends.base import Request
from modeconn.backends.native import extension as native
from modeconn.backends.native.backend import NativeBackend
from modeconn.backends.native.partition import straight_steps, whole_subgraph
from modeconn.backends.reference import ReferenceBackend
from modeconn.errors import Unsupported
from modeconn.models import build
from modeconn.plan.program import SHARED
from naive import clone, pass_per_point
from native_backend_cases import Y, agrees
from policy import assert_within_policy

pytestmark = pytest.mark.skipif(
    not native.available(), reason=f"no C++ extension: {native.reason()}"
)


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


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_convolutions_that_are_constant_run_in_the_engine_in_float64(precision):
    """At the breakpoints of a chain all is constant: PyTorch has no kernels of float64 for it."""
    model, dtype = build("resnet20:width=4"), getattr(torch, precision)
    torch.manual_seed(0)
    a = clone(model)
    b = {key: v + 0.1 * torch.rand_like(v) if v.dim() == 4 else v for key, v in a.items()}
    b = {**b, "layer1.0.conv1.weight": a["layer1.0.conv1.weight"]}
    a["layer2.1.conv2.weight"][:, 2:] = 0
    path, x = mc.PolyChain([a, b, a]), torch.randn(19, 3, 32, 32, dtype=dtype)
    program = mc.explain(model, path, x, 3, precision=precision).program
    cpu = torch.device("cpu")
    engine = NativeBackend(Request(program, dtype, cpu))
    assert bool(engine._fused.get(SHARED)) == (precision == "float64")
    got, plain = (each.shared(x) for each in (engine, ReferenceBackend(program, dtype, cpu)))
    assert set(got) == set(plain) == set(program.kept())
    for number, value in plain.items():
        assert_within_policy(f"value {number}", got[number], value, value, dtype)
