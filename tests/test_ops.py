"""Operations that run in another way than usual give what the usual way gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from modeconn.capture import ops
from policy import assert_within_policy


@pytest.fixture(params=[False, True], ids=["matrix product", "convolution"])
def way(request, monkeypatch) -> bool:
    monkeypatch.setattr(ops, "mkl_falls_behind", lambda: request.param)
    return request.param


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(0, 3, 2), (1, 3, 2), (64, 1, 1), (65, 7, 245), (1025, 245, 10), (100, 63, 3)],
    ids=str,
)
def test_linear(way, shape, bias):
    rows, before, after = shape
    x, weight = torch.randn(rows, before), torch.randn(after, before)
    offset = torch.randn(after) if bias else None
    got = ops.linear(x, weight, offset)
    exact = F.linear(x.double(), weight.double(), offset.double() if bias else None)
    assert_within_policy("linear", got, F.linear(x, weight, offset), exact, torch.float32)
    assert got.shape == (rows, after)


def test_linear_of_other_layouts(way):
    x, weight = torch.randn(70, 40), torch.randn(5, 40)
    torch.testing.assert_close(
        ops.linear(x[:, ::2], weight[:, ::2]), F.linear(x[:, ::2], weight[:, ::2])
    )
    torch.testing.assert_close(ops.linear(x.t()[:, :70].t(), weight), F.linear(x, weight))
    torch.testing.assert_close(
        ops.linear(x.double(), weight.double()), F.linear(x.double(), weight.double())
    )
    torch.testing.assert_close(
        ops.linear(x.view(35, 2, 40), weight), F.linear(x.view(35, 2, 40), weight)
    )


def test_linear_keeps_what_is_not_finite(way):
    x = torch.randn(70, 4)
    x[3, 1], x[4, 2] = float("nan"), float("inf")
    got, usual = ops.linear(x, torch.ones(3, 4)), F.linear(x, torch.ones(3, 4))
    torch.testing.assert_close(got, usual, equal_nan=True)


def test_linear_is_differentiable(way):
    x, weight = torch.randn(70, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    ops.linear(x, weight).square().sum().backward()
    ours = x.grad, weight.grad
    x.grad = weight.grad = None
    F.linear(x, weight).square().sum().backward()
    torch.testing.assert_close(ours, (x.grad, weight.grad))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_convolution_in_float64_by_few_images_at_a_time(rows, groups, monkeypatch):
    monkeypatch.setattr(ops, "_UNFOLDED_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.randn(rows, 4, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64)
    own = (weight, torch.randn(6, dtype=torch.float64), [2, 1], [1, 0], [1, 2], groups)
    got, usual = ops.conv2d(x, *own), torch.conv2d(x, *own)
    torch.testing.assert_close(got, usual)
    gradients = [torch.autograd.grad(each.square().sum(), x)[0] for each in (got, usual)]
    torch.testing.assert_close(*gradients)
