"""The Triton backend against the reference: one program, equal numbers, or a reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.backends.triton.backend import TritonBackend
from modeconn.backends.triton.schedule import ChunkSchedule
from modeconn.backends.triton.segment import SegmentSteps, find_epilogue
from modeconn.models import build
from naive import clone, mlp, pass_per_point
from policy import assert_within_policy
from triton_cases import X, Y

pytest.importorskip("triton")

CPU = torch.device("cpu")
IMAGES = torch.randn(5, 2, 8, 7, generator=torch.Generator().manual_seed(0))


def agrees(
    model: nn.Module, path: mc.PolyChain | mc.Line, x: Any, y: Tensor, points: Any, **options: Any
) -> mc.PathResult:
    """Compare with plain PyTorch's distance from float64."""
    got = mc.evaluate(model, path, (x, y), points, backend="triton", **options)
    assert got.backend == "triton"
    if not options and x.is_floating_point():
        plain_values, exact_values = (
            pass_per_point(model, path, x, y, got.t, d) for d in (torch.float32, torch.float64)
        )
        for name in ("loss", "error"):
            assert_within_policy(
                name, got.values[name], plain_values[name], exact_values[name], torch.float32
            )
        return got
    plain = mc.evaluate(model, path, (x, y), points, backend="reference", **options)
    wide = x.double() if x.is_floating_point() else x
    exact = mc.evaluate(
        model, path, (wide, y), points, backend="reference", precision="float64", **options
    )
    for name, values in got.values.items():
        assert_within_policy(name, values, plain.values[name], exact.values[name], torch.float32)
    return got


def kernels(model: nn.Module, path: Any, x: Tensor, points: Any = 3) -> list[list[str]]:
    """List each segment's operations, by their last steps, and the layers of its epilogue."""
    program = mc.explain(model, path, x[:2], points).program
    found = []
    for segment in program.segments:
        steps = SegmentSteps(program, segment, CPU, "float32")
        epilogue = find_epilogue(steps, 256)
        assert epilogue is not None
        operations = ChunkSchedule(steps, [epilogue.reads]).operations
        names = [segment.steps[operation.step].node.op for operation in operations]
        found.append([*names, f"epilogue {len(epilogue.layers)}"])
    return found


# -- perceptrons -----------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 3])
def test_lines_of_perceptrons(points):
    a, b = (mlp(6, 9, 7, 4, seed=k) for k in range(2))
    agrees(a, mc.Line(a, b), X, Y, points)
    assert kernels(a, mc.Line(a, b), X) == [["linear", "relu", "epilogue 2"]]


def test_layers_too_wide_for_one_kernel():
    a, b = (mlp(6, 258, 3, 4, seed=k) for k in range(2))
    agrees(a, mc.Line(a, b), X, Y, 3)
    assert kernels(a, mc.Line(a, b), X) == [["linear", "relu", "relu", "epilogue 1"]]


@pytest.mark.parametrize("module", [nn.LeakyReLU, nn.GELU], ids=lambda m: m.__name__)
def test_activations(module):
    a, b = (mlp(6, 5, 5, 4, activation=module, seed=k) for k in range(2))
    agrees(a, mc.Line(a, b), X, Y, 3)


def test_more_control_points_than_a_kernel_adds_up():
    nets = [mlp(6, 5, 3, 4, seed=k) for k in range(5)]
    agrees(
        nets[0],
        mc.Mixture(nets),
        X,
        Y,
        [[0.2] * 5, [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0.3, -1, 0, 2, 0.5]],
    )


def test_dead_units_and_swings():
    a = clone(mlp(6, 9, 8, 4))
    a["4.weight"][:, 4:] = 0
    b, c = clone(a), clone(a)
    b["2.weight"][4:] += 1.0  # dead units move: one point for all
    c["2.weight"][4:] += 1.0
    c["4.weight"][:, :4] += 0.3  # the last layer moves: combined logits
    d = clone(c)
    d["2.weight"][:4] -= 0.2
    model = mlp(6, 9, 8, 4)
    path = mc.PolyChain([a, b, c, d])
    got = agrees(model, path, X, Y, 13)
    assert got.loss[0] == got.loss[3]
    assert kernels(model, path, X, 13) == [
        ["epilogue 0"],
        ["epilogue 0"],
        ["linear", "relu", "epilogue 1"],
    ]


@pytest.mark.parametrize("points", [2, 5, [0.7, 0.1, 1.5, -0.5]], ids=str)
def test_combined_logits_keep_the_order_of_the_points(points):
    """Points with coefficients of their own are sorted by these, also where all have."""
    a = mlp(6, 9, 8, 4)
    b = clone(a)
    b["4.weight"] += 0.3 * torch.randn_like(b["4.weight"])
    for path in (mc.Line(a, b), mc.Line(b, a), mc.PolyChain([a, b, clone(a)])):
        agrees(a, path, X, Y, points)


def test_weights_and_biases_that_vary_apart():
    a = mlp(6, 5, 3, 4)
    for moved in (("2.weight",), ("2.bias",), ("0.bias", "4.bias")):
        b = clone(a)
        for key in moved:
            b[key] += 0.3 * torch.randn_like(b[key])
        agrees(a, mc.Line(a, b), X, Y, 3)


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_chunks_and_blocks_within_a_budget(monkeypatch):
    a, b = (Residual(seed) for seed in range(2))
    whole = mc.evaluate(a, mc.Line(a, b), (X, Y), 7, backend="triton")
    for free in (1.0, 200.0, 1000.0):
        monkeypatch.setattr(TritonBackend, "_free", lambda self, free=free: free)
        small = mc.evaluate(a, mc.Line(a, b), (X, Y), 7, backend="triton")
        np.testing.assert_allclose(small.loss, whole.loss, rtol=1e-6)
        np.testing.assert_array_equal(small.error, whole.error)


def test_heads_of_other_kinds():
    a, b = (mlp(6, 5, 4, seed=k) for k in range(2))
    for target, options in (
        (torch.rand(9, 4), {"loss": "mse"}),
        (Y, {"metrics": ("loss", _margin)}),
        (Y, {"metrics": ("perplexity", "loss", "error")}),
    ):
        agrees(a, mc.Line(a, b), X, target, 3, **options)


def _margin(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.amax(1) - outputs.gather(1, targets[:, None])[:, 0]


def test_top5():
    a, b = (mlp(6, 5, 7, seed=k) for k in range(2))
    agrees(a, mc.Line(a, b), X, torch.arange(9) % 7, 3, metrics=("top5_error", "loss", "error"))


# -- convolutions ----------------------------------------------------------------------------------


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with running statistics of its own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.train()
    model(x)
    return model.eval()


def vgg(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(5, 4),
    )
    return trained(model, IMAGES[:, :, :, :6])


class Block(nn.Module):
    """A residual network of one block, whose shortcut is a convolution or nothing."""

    def __init__(self, seed: int, shortcut: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()
        )
        out, stride = (4, 2) if shortcut else (3, 1)
        self.one = nn.Sequential(
            nn.Conv2d(3, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
        )
        self.two = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out))
        self.shortcut = (
            nn.Sequential(nn.Conv2d(3, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if shortcut
            else None
        )
        self.head = nn.Linear(out, 4)
        trained(self, IMAGES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(self.two(self.one(x)) + (x if self.shortcut is None else self.shortcut(x)))
        out: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return out


stale = pytest.mark.filterwarnings("ignore:batch norms .* interpolated")


@stale
def test_a_network_like_vgg():
    nets = [vgg(seed) for seed in range(2)]
    x = IMAGES[:, :, :, :6]
    agrees(nets[0], mc.Line(*nets), x, Y[:5], 3)
    fused = ["relu", "max_pool2d", "relu", "avg_pool2d", "flatten", "epilogue 2"]
    assert kernels(nets[0], mc.Line(*nets), x) == [fused]


@stale
@pytest.mark.parametrize("shortcut", [False, True])
def test_residual_networks(shortcut):
    nets = [Block(seed, shortcut) for seed in range(2)]
    agrees(nets[0], mc.Line(*nets), IMAGES, Y[:5], 3)
    (calls,) = kernels(nets[0], mc.Line(*nets), IMAGES)
    assert "add" not in calls and "conv2d" not in calls, "sums and norms go with the convolutions"


def test_statistics_that_are_recomputed():
    nets = [vgg(seed) for seed in range(2)]
    agrees(nets[0], mc.Line(*nets), IMAGES[:, :, :, :6], Y[:5], 3, buffers="recompute")


class Residual(nn.Module):
    """A sum without a convolution to take it along, a norm behind it, and an unknown operation."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.norm, self.head = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.rand(6))
        self.norm.running_mean = torch.randn(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + torch.relu(self.inner(x)))
        out: Tensor = self.head(torch.cumsum(torch.sin(x * self.scale), 1))
        return out


@stale
def test_what_has_no_kernel_is_left_to_pytorch():
    a, b = (Residual(seed) for seed in range(2))
    agrees(a, mc.Line(a, b), X, Y, 3)


# -- transformers ----------------------------------------------------------------------------------


def gpt(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build("gpt:vocab=7,context=4,width=8,layers=1,heads=2")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("loss", ["next_token", "cross_entropy"])
def test_a_transformer_over_tokens(loss):
    nets = [gpt(seed) for seed in range(2)]
    tokens = torch.randint(0, 7, (3, 4), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[1, 2] = -100
    got = agrees(
        nets[0],
        mc.Line(*nets),
        tokens,
        labels,
        2,
        loss=loss,
        metrics=("loss", "error", "perplexity"),
    )
    assert np.isfinite(got.loss).all()
