"""path_linear, interpreted, against its reference: values, gradients, odd shapes, bad input."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from kernel_cases import KINDS, blended, compare, samples
from modeconn.errors import ModeconnError
from modeconn.kernels.activations import ACTIVATIONS
from modeconn.kernels.blended import Blended
from modeconn.kernels.path_linear import blends_in_prologue, path_linear, path_linear_reference
from policy import assert_within_policy

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "points, rows, depth, units, terms",
    [(1, 1, 1, 1, 1), (3, 7, 5, 3, 2), (2, 63, 33, 40, 3), (2, 3, 245, 245, 2), (1, 2, 1025, 7, 2)],
)
def test_values_and_gradients(kind, points, rows, depth, units, terms):
    x = samples(kind, points, rows, depth)
    options = {"input_activation": "tanh"} if kind == "combined" else {}
    arguments = (x, blended(terms, points, units, depth), blended(2, points, units))
    compare(path_linear, path_linear_reference, arguments, activation="relu", **options)


def test_materialized_weights_over_several_row_tiles(monkeypatch):
    assert not blends_in_prologue(row_tiles=4, terms=2)
    monkeypatch.setattr("modeconn.kernels.path_linear.MATERIALIZED_BYTES", 1)  # a chunk per point
    compare(
        path_linear, path_linear_reference, (samples("shared", 2, 200, 20), blended(2, 2, 17, 20))
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x, options = (
        samples("combined", 2, 3, 4),
        {"activation": activation, "slope": 0.125, "input_slope": 0.25},
    )
    arguments = (x, blended(2, 2, 5, 4), blended(1, 2, 5))
    compare(path_linear, path_linear_reference, arguments, input_activation=activation, **options)


def test_strides():
    x = torch.randn(2, 6, 10)[:, :, ::2].transpose(0, 1).contiguous().transpose(0, 1)
    weight = Blended(torch.randn(2, 5, 7).transpose(1, 2), torch.randn(2, 4).t()[:2])
    weight = Blended(weight.tensors, torch.randn(2, 2).t())
    out = path_linear(x, weight)
    plain = path_linear_reference(x, weight)
    exact = path_linear_reference(x.double(), Blended(weight.tensors.double(), weight.coefficients))
    assert_within_policy("strided", out, plain, exact, torch.float32)


def test_what_is_not_finite_stays_where_it_is():
    x = torch.randn(2, 3, 33)
    x[0, 1, 2] = float("nan")
    x[1, 2, 0] = float("inf")
    tensors = torch.randn(2, 34, 33)
    tensors[1, 3] = float("nan")  # with a coefficient of 0 at the first point
    weight = Blended(tensors, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    out, exact = path_linear(x, weight), path_linear_reference(x, weight)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing(shape):
    points, rows, depth = shape
    x = torch.randn(points, rows, depth, requires_grad=True)
    out = path_linear(x, Blended(torch.randn(1, 5, depth), torch.ones(points, 1)))
    assert out.shape == (points, rows, 5) and not out.any()
    out.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("precision, digits", [("tf32", 2**-10), ("bf16", 2**-7)])
def test_precisions_round_the_operands(precision, digits):
    x, weight = samples("per point", 2, 70, 33), blended(2, 2, 40, 33)
    out, exact = path_linear(x, weight, precision=precision), path_linear_reference(x, weight)
    error = (out - exact).abs().max() / exact.abs().max()
    assert error <= 4 * digits
    assert precision == "tf32" or error > 2**-20  # the interpreter computes tf32 in float32


def test_low_precision_values():
    x, weight = samples("per point", 2, 5, 7).bfloat16(), blended(2, 2, 3, 7)
    out = path_linear(x, weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), path_linear_reference(x.float(), weight), rtol=2**-7, atol=2**-7
    )


def test_bad_input():
    x, weight = torch.randn(3, 4), blended(2, 2, 5, 4)
    with pytest.raises(
        ModeconnError,
        match=r"weight has shape \[5, 4\] at one point: expected \[out, in\] with in = 3",
    ):
        path_linear(x[:, :3], weight)
    with pytest.raises(ModeconnError, match="x has 3 points and the weight 2"):
        path_linear(torch.randn(3, 1, 4), weight)
    with pytest.raises(ModeconnError, match=r"bias has shape \[4\] at one point: expected \[5\]"):
        path_linear(x, weight, blended(1, 2, 4))
    with pytest.raises(ModeconnError, match="activation is 'swish'"):
        path_linear(x, weight, activation="swish")
    with pytest.raises(ModeconnError, match="input_activation is 'relu' and x is a tensor"):
        path_linear(x, weight, input_activation="relu")
    with pytest.raises(ModeconnError, match="precision is 'fp8'"):
        path_linear(x, weight, precision="fp8")
    with pytest.raises(ModeconnError, match=r"x has dtype torch\.float64"):
        path_linear(x.double(), weight)
    with pytest.raises(ModeconnError, match="coefficients of weight require a gradient"):
        path_linear(x, Blended(weight.tensors, weight.coefficients.requires_grad_()))
