"""path_conv2d in Triton's interpreter against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from policy import assert_within_policy

pytest.importorskip("triton")

from kernel_cases import blended, copied
from modeconn.errors import ModeconnError
from modeconn.kernels import path_conv2d as module
from modeconn.kernels.blended import Blended
from modeconn.kernels.path_conv2d import path_conv2d, path_conv2d_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Samples, channels, height and width; outputs and kernel; stride, padding.
SHAPES = {
    "3x3": ((2, 33, 5, 7), (5, 3, 3), (1, 1), (1, 1)),
    "3x3, 16 channels": ((2, 16, 5, 4), (16, 3, 3), (1, 1), (1, 1)),
    "3x3, a first layer": ((3, 3, 6, 5), (33, 3, 3), (1, 1), (1, 1)),
    "3x3, strided": ((3, 17, 7, 4), (7, 3, 3), (2, 2), (1, 1)),
    "1x1, strided": ((2, 35, 5, 4), (2, 1, 1), (2, 2), (0, 0)),
    "2x3, uneven": ((1, 1, 5, 6), (1, 2, 3), (2, 1), (0, 2)),
    "all one": ((1, 1, 1, 1), (1, 1, 1), (1, 1), (0, 0)),
    "tiles of pixels and of columns": ((3, 18, 8, 9), (67, 1, 1), (1, 1), (0, 0)),
    "whole image": ((2, 4, 3, 3), (3, 3, 3), (1, 1), (0, 0)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check(x: Any, weight: Blended, bias: Blended | None = None, **options: Any) -> torch.Tensor:
    """Compare with the reference; the kernel's outputs."""
    got = path_conv2d(x, weight, bias, **options)
    options.pop("precision", None)
    plain = path_conv2d_reference(x, weight, bias, **options)
    wide = {name: copied(value) for name, value in options.items()}
    referee = path_conv2d_reference(*map(copied, (x, weight, bias)), **wide)
    assert_within_policy("conv2d", got, plain, referee, torch.float32)
    assert got.movedim(2, -1).is_contiguous(), "not channels last"
    return got


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_images_of_every_point(name, points):
    shape, (units, *kernel), stride, padding = SHAPES[name]
    weight, bias = blended(2, points, units, shape[1], *kernel), blended(2, points, units)
    check(torch.randn(points, *shape), weight, bias, stride=stride, padding=padding)


@pytest.mark.parametrize("name", ["3x3", "tiles of pixels and of columns", "1x1, strided"])
def test_images_that_the_points_share(name, monkeypatch):
    """However many of their pixels are thought to stay in L2."""
    monkeypatch.setattr(module, "GROUP_BYTES", 1)
    shape, (units, *kernel), stride, padding = SHAPES[name]
    check(
        torch.randn(shape), blended(2, 3, units, shape[1], *kernel), stride=stride, padding=padding
    )


@pytest.mark.parametrize("activation", ["identity", "sigmoid", "leaky_relu"])
@pytest.mark.parametrize("name", ["3x3", "3x3, a first layer"])
def test_images_as_a_combination(name, activation):
    """The padding is zero behind the activation: sigmoid(0) is not."""
    shape, (units, *kernel), stride, padding = SHAPES[name]
    x, weight = blended(3, 2, *shape), blended(2, 2, units, shape[1], *kernel)
    check(x, weight, stride=stride, padding=padding, input_activation=activation, input_slope=0.3)


@pytest.mark.parametrize(
    "activation", ["identity", "relu", "leaky_relu", "tanh", "gelu", "gelu_tanh", "silu", "sigmoid"]
)
def test_what_follows_in_one_pass(activation):
    x, weight, bias = torch.randn(2, 2, 3, 4, 5), blended(2, 2, 6, 3, 3, 3), blended(3, 2, 6)
    scale, shift, residual = torch.randn(2, 6), torch.randn(2, 6), torch.randn(2, 2, 6, 4, 5)
    check(
        x,
        weight,
        bias,
        scale=scale,
        shift=shift,
        residual=residual,
        padding=(1, 1),
        activation=activation,
        slope=0.2,
    )


@pytest.mark.parametrize("given", ["scale", "shift", "residual"])
def test_each_of_them_alone(given):
    tensors = {
        "scale": torch.randn(2, 6),
        "shift": torch.randn(2, 6),
        "residual": torch.randn(2, 6, 4, 5),
    }
    x, weight = torch.randn(2, 3, 4, 5), blended(2, 2, 6, 3, 3, 3)
    bias = blended(1, 2, 6) if given == "scale" else None
    check(x, weight, bias, padding=(1, 1), activation="relu", **{given: tensors[given]})


def test_a_norm_that_cancels_a_great_bias():
    """A folded norm subtracts the mean, which holds the bias: their float32 sum must not show."""
    x, weight, bias = torch.randn(2, 3, 4, 4), blended(2, 2, 5, 3, 3, 3), blended(2, 2, 5)
    bias = Blended(bias.tensors * 1e4, bias.coefficients)
    scale = torch.rand(2, 5) + 0.5
    check(x, weight, bias, scale=scale, shift=-scale * bias.materialized(), padding=(1, 1))


def test_points_go_in_chunks(monkeypatch):
    """Materialized weights are bounded: as many points as fit go at a time, with equal values."""
    weight, bias = blended(2, 5, 4, 3, 3, 3), blended(2, 5, 4)
    options = {"scale": torch.randn(5, 4), "shift": torch.randn(5, 4), "padding": (1, 1)}
    options["residual"] = torch.randn(5, 2, 4, 5, 5)
    inputs = [torch.randn(2, 3, 5, 5), torch.randn(5, 2, 3, 5, 5), blended(2, 5, 2, 3, 5, 5)]
    whole = [path_conv2d(x, weight, bias, **options) for x in inputs]
    sizes = []
    materialized = module.materialized
    monkeypatch.setattr(
        module,
        "materialized",
        lambda w, part, dtype: sizes.append(part) or materialized(w, part, dtype),
    )
    monkeypatch.setattr(module, "MATERIALIZED_BYTES", 2 * 4 * 4 * 32)
    for x, before in zip(inputs, whole):
        assert torch.equal(path_conv2d(x, weight, bias, **options), before)
    assert sizes == 3 * [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_weights_that_are_left_out_do_not_matter():
    x = torch.randn(2, 2, 3, 4, 4)
    bad = torch.full((1, 5, 3, 3, 3), float("nan"))
    weight = Blended(
        torch.cat([torch.randn(1, 5, 3, 3, 3), bad]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    )
    got = path_conv2d(x, weight)
    assert torch.isfinite(got[0]).all() and torch.isnan(got[1]).all()


def test_infinity_stays_beside_the_padding():
    """A masked tap is no product: infinite pixels make no NaN where no window sees them."""
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, 0, 0] = float("inf")
    got = path_conv2d(x, Blended.fixed(torch.ones(3, 2, 3, 3), 2), padding=(1, 1))
    assert torch.equal(
        got, path_conv2d_reference(x, Blended.fixed(torch.ones(3, 2, 3, 3), 2), padding=(1, 1))
    )


@pytest.mark.parametrize("layout", ["channels last", "every second", "expanded", "transposed"])
def test_memory_in_any_order(layout):
    x = torch.randn(2, 4, 6, 6, 6)
    x = {
        "channels last": x.movedim(2, -1).contiguous().movedim(-1, 2),
        "every second": x[:, ::2, ::2, ::2, 1:],
        "expanded": x[:1].expand(2, 4, 6, 6, 6),
        "transposed": x.transpose(3, 4),
    }[layout]
    weight = blended(2, 2, x.shape[2], 4, 3, 3)
    weight = Blended(weight.tensors.transpose(1, 2), weight.coefficients)  # [K, 4, C, 3, 3]
    residual = torch.randn(2, 6, 6, x.shape[1], 4).permute(0, 3, 4, 2, 1)[
        ..., : x.shape[3], : x.shape[4]
    ]
    check(x, weight, padding=(1, 1), residual=residual)


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 5, 5), (2, 0, 3, 5, 5)], ids=["no points", "no samples"]
)
def test_nothing_in_nothing_out(shape):
    got = path_conv2d(torch.randn(shape), blended(2, shape[0], 4, 3, 3, 3), blended(2, shape[0], 4))
    assert got.shape == (*shape[:2], 4, 3, 3)


def test_no_channels():
    """A sum over nothing, plus the bias; and no outputs."""
    x = torch.randn(2, 2, 0, 4, 4)
    bias = blended(2, 2, 5)
    expected = bias.materialized()[:, None, :, None, None].expand(2, 2, 5, 2, 2)
    torch.testing.assert_close(path_conv2d(x, blended(2, 2, 5, 0, 3, 3), bias), expected)
    assert path_conv2d(torch.randn(2, 2, 3, 4, 4), blended(2, 2, 0, 3, 3, 3)).shape == (
        2,
        2,
        0,
        2,
        2,
    )


def test_bf16_rounds_the_operands_and_nothing_else():
    """Rounds an operand by under 2⁻⁷ of itself (the interpreter cuts), bfloat16's not at all."""
    x, weight = torch.randn(2, 2, 18, 5, 5), blended(2, 2, 5, 18, 3, 3)
    got, referee = (
        path_conv2d(x, weight, precision="bf16"),
        path_conv2d_reference(copied(x), copied(weight)),
    )
    at = weight.materialized()
    sizes = torch.cat(
        [path_conv2d_reference(x[t : t + 1].abs(), Blended.fixed(at[t].abs(), 1)) for t in range(2)]
    )
    assert ((got - referee).abs() <= (2 * 2**-7 + 2**-14) * sizes).all()
    assert not torch.equal(got, path_conv2d(x, weight))
    held = Blended.fixed(at[0].bfloat16().float(), 2)
    check(x.bfloat16().float(), held, precision="bf16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_memory(dtype):
    """Read, computed on in float32, and rounded once at the end."""
    x, weight = torch.randn(2, 2, 3, 5, 5).to(dtype), blended(2, 2, 4, 3, 3, 3)
    got = path_conv2d(x, weight, residual=torch.ones(2, 2, 4, 3, 3).to(dtype))
    assert got.dtype == dtype
    referee = path_conv2d_reference(
        x.double(), copied(weight), residual=torch.ones(2, 2, 4, 3, 3).double()
    )
    assert (got.double() - referee).abs().max() <= torch.finfo(dtype).eps * referee.abs().max()


def test_the_same_bits_twice():
    x, weight = torch.randn(2, 2, 16, 5, 5), blended(2, 2, 5, 16, 3, 3)
    assert torch.equal(path_conv2d(x, weight), path_conv2d(x, weight))


BAD = {
    "groups": ({"groups": 2}, "groups is 2"),
    "dilation": ({"dilation": (2, 2)}, r"dilation \(2, 2\)"),
    "channels": (
        {"weight": blended(2, 2, 4, 5, 3, 3)},
        r"weight has shape \[4, 5, 3, 3\].*x \[2, 3, 5, 5\].*groups",
    ),
    "points": ({"weight": blended(2, 3, 4, 3, 3, 3)}, "x has 2 points and the weight 3"),
    "a matrix": ({"weight": blended(2, 2, 4, 3)}, r"expected \[out, in, kh, kw\]"),
    "bias": ({"bias": blended(2, 2, 5)}, r"bias has shape \[5\].*expected \[4\]"),
    "scale": ({"scale": torch.randn(4)}, r"scale has shape \[4\].*\[2, 4\]"),
    "residual": (
        {"residual": torch.randn(2, 2, 4, 5, 5)},
        r"residual has shape \[2, 2, 4, 5, 5\].*\[2, 2, 4, 3, 3\]",
    ),
    "stride": ({"stride": (0, 1)}, r"stride is \(0, 1\)"),
    "padding": ({"padding": 1}, "padding is 1"),
    "no room": (
        {"x": torch.randn(2, 2, 3, 2, 5)},
        r"window of \[3, 3\] does not fit into images of \[2, 5\]",
    ),
    "activation": ({"activation": "swish"}, "activation is 'swish'"),
    "precision": ({"precision": "fp8"}, "precision is 'fp8'"),
    "axes": ({"x": torch.randn(3, 5, 5)}, r"x has shape \[3, 5, 5\]"),
    "float64": ({"x": torch.randn(2, 2, 3, 5, 5).double()}, "dtype torch.float64"),
    "gradient": ({"x": torch.randn(2, 2, 3, 5, 5, requires_grad=True)}, "x requires a gradient"),
    "input activation": ({"input_activation": "relu"}, "belongs to a Blended"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    changed, message = BAD[name]
    given = {"x": torch.randn(2, 2, 3, 5, 5), "weight": blended(2, 2, 4, 3, 3, 3), **changed}
    with pytest.raises(ModeconnError, match=message):
        path_conv2d(**given)


def test_gradients_are_refused_only_where_they_would_be_recorded():
    x = torch.randn(2, 2, 3, 5, 5, requires_grad=True)
    with torch.no_grad():
        assert path_conv2d(x, blended(2, 2, 4, 3, 3, 3)).shape == (2, 2, 4, 3, 3)
