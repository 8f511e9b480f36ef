"""Kernels and Triton backend as on a GPU: CUDA tensors (MODECONN_TEST_DEVICE=cuda), else tiny.

Every kernel is compared with its reference in float64 at odd sizes and, on a GPU, at large ones;
gradients with the reference's. Shapes whose products the interpreter cannot do in time are the
GPU's alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.data.inputs import leaves
from modeconn.data.prefetch import resident
from modeconn.kernels.blended import Blended
from modeconn.models import build
from naive import mlp
from policy import FLOOR, assert_within_policy

pytest.importorskip("triton")

from kernel_cases import copied

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

PRECISIONS = ("float32", "tf32", "bf16")
# What rounding operands of a product to 10 and 7 bits may do to the largest value.
ROUNDED = {"tf32": 2e-3, "bf16": 2e-2}


class Draw:
    """Random tensors, the same on every device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=self.generator)).to(self.device)

    def blended(self, points: int, terms: int, *shape: int, scale: float = 1.0) -> Blended:
        columns = torch.rand(points, terms, generator=self.generator).to(self.device)
        return Blended(
            self.normal(terms, *shape, scale=scale), columns / columns.sum(1, keepdim=True)
        )

    def labels(self, count: int, classes: int) -> Tensor:
        return torch.randint(0, classes, (count,), generator=self.generator).to(self.device)


def op(name: str, file: str = "") -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A kernel's public function and its reference."""
    module = importlib.import_module(f"modeconn.kernels.{file or name}")
    return getattr(module, name), getattr(module, f"{name}_reference")


def judge(
    name: str,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    precision: str | None = None,
    file: str = "",
) -> None:
    """A kernel's output against its reference in float64."""
    function, reference = op(name, file)
    got = function(*arguments, **options, **({} if precision is None else {"precision": precision}))
    plain = reference(*arguments, **options)
    exact = reference(
        *map(copied, arguments), **{key: copied(value) for key, value in options.items()}
    )
    got, plain, exact = (v.detach().double().cpu().numpy() for v in (got, plain, exact))
    if precision in ROUNDED:
        floor = FLOOR[torch.float32] * torch.finfo(torch.float32).eps
        assert np.abs(got - exact).max() <= (ROUNDED[precision] + floor) * np.abs(exact).max()
    else:
        assert_within_policy(name, got, plain, exact, torch.float32)


def sizes(
    device: torch.device, tiny: list[tuple[int, ...]], large: list[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    return tiny + large if device.type == "cuda" else tiny


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["shared", "per point", "combined"])
def test_linear(device, kind, precision):
    draw = Draw(device)
    large = [
        (128, 1, 1, 1),
        (3, 1025, 245, 245),
        (2, 4099, 1024, 1023),
        (7, 63, 63, 1025),
        (2, 60_001, 245, 245),
    ]
    for points, rows, before, after in sizes(device, [(2, 3, 5, 7)], large):
        weight, bias = (
            draw.blended(points, 2, after, before, scale=before**-0.5),
            draw.blended(points, 3, after),
        )
        x: Tensor | Blended = draw.normal(rows, before)
        if kind == "per point":
            x = draw.normal(points, rows, before)
        combined = kind == "combined"
        options = {"activation": "relu", "input_activation": "gelu" if combined else "identity"}
        judge(
            "path_linear",
            (draw.blended(points, 2, rows, before) if combined else x, weight, bias),
            options,
            precision,
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_mlp(device, precision):
    from modeconn.kernels.path_mlp import PathLayer

    draw = Draw(device)
    large = [(3, 1025, 245, 3), (2, 63, 256, 10), (16, 20_011, 245, 2), (2, 7, 1, 2)]
    for points, rows, width, depth in sizes(device, [(2, 3, 5, 1)], large):

        def layer(after: int, activation: str, points: int = points, width: int = width) -> Any:
            weight, bias = (
                draw.blended(points, 2, after, width, scale=(2 / width) ** 0.5),
                draw.blended(points, 2, after),
            )
            return PathLayer(weight, bias, activation, 0.01)

        layers = [*(layer(width, "relu") for _ in range(depth)), layer(10, "identity")]
        x = draw.blended(points, 2, rows, width)
        judge(
            "path_mlp",
            (x, layers, draw.labels(rows, 10)),
            {"input_activation": "relu", "top5": True},
            precision,
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_cross_entropy(device, precision):
    draw = Draw(device)
    for points, rows, width, classes in sizes(
        device, [(2, 3, 5, 7)], [(3, 1025, 245, 10), (2, 257, 63, 50_257), (1, 1, 1, 1)]
    ):
        weight, bias = (
            draw.blended(points, 2, classes, width, scale=width**-0.5),
            draw.blended(points, 2, classes),
        )
        labels, top5 = draw.labels(rows, classes), {"top5": True}
        judge(
            "path_cross_entropy",
            (draw.normal(points, rows, width), weight, bias, labels),
            top5,
            precision,
        )
        judge(
            "path_cross_entropy", (draw.blended(points, 2, rows, classes), None, None, labels), top5
        )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_conv2d(device, precision):
    draw = Draw(device)
    large = [
        (2, 65, 64, 128, 16, 3, 1),
        (3, 7, 3, 63, 17, 3, 2),
        (2, 33, 65, 31, 8, 1, 2),
        (1, 1, 1, 1, 1, 1, 1),
    ]
    for points, images, before, after, side, size, stride in sizes(
        device, [(2, 2, 3, 5, 4, 3, 1)], large
    ):
        weight = draw.blended(
            points, 2, after, before, size, size, scale=(before * size * size) ** -0.5
        )
        scale, shift = draw.normal(points, after), draw.normal(points, after)
        out = (side + 2 * (size // 2) - size) // stride + 1
        residual = draw.normal(points, images, after, out, out)
        options = {"scale": scale, "shift": shift, "residual": residual, "activation": "relu"}
        options |= {"stride": (stride, stride), "padding": (size // 2, size // 2)}
        judge(
            "path_conv2d",
            (draw.normal(points, images, before, side, side), weight),
            options,
            precision,
        )


def test_pooling_and_norms(device):
    draw = Draw(device)
    for points, images, channels, side in sizes(
        device, [(2, 2, 3, 5)], [(3, 65, 63, 17), (2, 512, 64, 32)]
    ):
        x = draw.normal(points, images, channels, side, side)
        for kind in ("max", "avg"):
            judge("path_pool2d", (x, kind, (3, 2), (2, 1), (1, 0)), {})
    for points, rows, width in sizes(
        device, [(2, 3, 5)], [(3, 1025, 768), (2, 63, 1025), (2, 3, 1)]
    ):
        x, weight, bias = (
            draw.normal(points, rows, width),
            draw.blended(points, 2, width),
            draw.blended(points, 2, width),
        )
        judge("path_layer_norm", (x, weight, bias, 1e-5), {}, file="path_norm")
        judge("path_rms_norm", (x, weight, 1e-6), {}, file="path_norm")


@pytest.mark.parametrize("name", ["path_linear", "path_cross_entropy", "path_mlp"])
def test_gradients(device, name):
    """Of x, weights and biases, by the reference's autograd."""
    for points, rows, width in sizes(device, [(2, 3, 5)], [(3, 257, 245), (2, 1025, 63)]):
        judge_gradients(name, Draw(device), points, rows, width)


def judge_gradients(name: str, draw: Draw, points: int, rows: int, width: int) -> None:
    from modeconn.kernels.path_mlp import PathLayer

    function, reference = op(name)
    weight, bias = (
        draw.blended(points, 2, 10, width, scale=width**-0.5),
        draw.blended(points, 2, 10),
    )
    leaves = [draw.normal(points, rows, width), weight.tensors, bias.tensors]
    labels, direction = draw.labels(rows, 10), draw.normal(points, rows, 10)

    def gradients(of: Any, dtype: torch.dtype) -> list[np.ndarray]:
        given = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        blends = [Blended(t, w.coefficients.to(dtype)) for t, w in zip(given[1:], (weight, bias))]
        if name == "path_linear":
            total = (of(given[0], *blends, activation="tanh") * direction.to(dtype)).sum()
        elif name == "path_cross_entropy":
            total = of(given[0], *blends, labels)[:, 0].sum()
        else:
            total = of(given[0], [PathLayer(*blends, "identity", 0.01)], labels)[:, 0].sum()
        return [g.double().cpu().numpy() for g in torch.autograd.grad(total, given)]

    runs = ((function, torch.float32), (reference, torch.float32), (reference, torch.float64))
    every = (gradients(of, dtype) for of, dtype in runs)
    for what, got, plain, exact in zip(("x", "weight", "bias"), *every):
        assert_within_policy(f"{name}, {what}", got, plain, exact, torch.float32)


@pytest.mark.parametrize(
    "spec",
    [
        "mlp:784-245x3-10",
        "mlp:20-1023x2-10",
        "vgg11_bn:width=8",
        "resnet20",
        "vit",
        "gpt:vocab=65,context=64",
    ],
)
@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_whole_evaluations(device, spec):
    if device.type != "cuda":
        pytest.skip("too large for the interpreter; tests/test_triton_backend.py has small ones")
    draw = Draw(device)
    torch.manual_seed(0)
    nets: list[nn.Module] = [build(spec).to(device).eval() for _ in range(2)]
    if spec.startswith("gpt"):
        x = torch.randint(0, 65, (33, 64), generator=draw.generator).to(device)
        y, loss = x, "next_token"
    else:
        x = (
            draw.normal(515, int(spec[4:].split("-")[0]))
            if spec.startswith("mlp")
            else draw.normal(65, 3, 32, 32)
        )
        y, loss = draw.labels(len(x), 10), "cross_entropy"
    path = mc.Line(*nets)
    for inputs, targets in (((x, y)), (x.cpu(), y.cpu())):
        got, plain, exact = (
            mc.evaluate(
                nets[0],
                path,
                (inputs, targets),
                17,
                backend=b,
                precision=p,
                loss=loss,
                device=device,
                batch_size=200,
            )
            for b, p in (("triton", "float32"), ("reference", "float32"), ("reference", "float64"))
        )
        for name in ("loss", "error"):
            assert_within_policy(
                name, got.values[name], plain.values[name], exact.values[name], torch.float32
            )


def test_auto_takes_the_kernels(device):
    a, b = (mlp(20, 9, 4, seed=k).to(device) for k in range(2))
    data = torch.randn(9, 20, device=device), torch.arange(9, device=device) % 4
    assert (mc.evaluate(a, mc.Line(a, b), data, 3).backend == "triton") == (device.type == "cuda")


def test_the_device_is_waited_for_once(device):
    """An evaluation asks the device for its sums, and for nothing before that."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    a, b = (mlp(20, 63, 10, seed=k).to(device) for k in range(2))
    x, y = torch.randn(1000, 20), torch.arange(1000) % 10
    waits = []
    for batch in (1000, 100):  # ten times the batches, as many waits
        mc.evaluate(a, mc.Line(a, b), (x, y), 16, device=device, batch_size=batch)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchroniz") as caught:
                mc.evaluate(a, mc.Line(a, b), (x, y), 16, device=device, batch_size=batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(len(caught))
    assert waits[0] == waits[1]


def test_recorded_work(device, monkeypatch):
    """CUDA graphs give what the same kernels give one by one."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device; tests/test_triton_backend.py has a stand-in for graphs")
    a, b = (mlp(20, 63, 63, 10, seed=k).to(device) for k in range(2))
    x, y = torch.randn(1000, 20), torch.arange(1000) % 10
    runs = []
    for wanted in ("0", "1"):
        monkeypatch.setenv("MODECONN_CUDA_GRAPHS", wanted)
        runs.append(
            mc.evaluate(
                a, mc.Line(a, b), (x, y), 16, backend="triton", device=device, batch_size=70
            )
        )
    for name in ("loss", "error"):
        np.testing.assert_allclose(*(run.values[name] for run in runs), rtol=1e-12)


def test_data_that_is_read_twice_goes_to_the_device_once(device):
    x, y = torch.randn(9, 3), torch.arange(9)
    cuda = torch.device("cuda")
    for data in ((x, y), ({"a": x, "b": x}, y), ((x, x), y)):
        assert resident(data, torch.device("cpu")) is data
        # does not fit in the share of it that it may take
        assert resident(data, cuda, free=lambda: 4 * 9 * 8) is data
        if device.type == "cuda":
            inputs, targets = resident(data, device)
            assert {part.device.type for part in (*leaves(inputs), targets)} == {"cuda"}
    for data in (x, [(x, y), (x, y)], (x.numpy(), y), [x]):
        assert resident(data, cuda, free=lambda: 1 << 30) is data
