"""Pooling at many points: the kernel in Triton's interpreter against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from policy import assert_within_policy

pytest.importorskip("triton")

from modeconn.errors import ModeconnError
from modeconn.kernels.path_pool2d import path_pool2d, path_pool2d_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Points, samples, channels, height, width; kernel, stride, padding.
SHAPES = {
    "2x2": ((3, 2, 5, 6, 8), (2, 2), (2, 2), (0, 0)),
    "2x2, odd images": ((2, 3, 7, 5, 7), (2, 2), (2, 2), (0, 0)),
    "3x3, overlapping": ((2, 2, 3, 7, 5), (3, 3), (2, 2), (1, 1)),
    "3x2, uneven": ((1, 1, 65, 5, 6), (3, 2), (1, 2), (1, 0)),
    "whole images": ((2, 1, 1, 4, 3), (4, 3), (4, 3), (0, 0)),
    "one pixel": ((1, 1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    "several tiles": ((3, 5, 2, 17, 17), (2, 2), (1, 1), (1, 1)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("name", SHAPES)
def test_pooling(name, kind):
    shape, *window = SHAPES[name]
    x = torch.randn(shape)
    got, plain = path_pool2d(x, kind, *window), path_pool2d_reference(x, kind, *window)
    assert_within_policy(
        kind, got, plain, path_pool2d_reference(x.double(), kind, *window), torch.float32
    )
    assert kind == "avg" or torch.equal(got, plain)
    assert got.movedim(2, -1).is_contiguous(), "not channels last"


@pytest.mark.parametrize("layout", ["channels last", "every second", "expanded"])
def test_memory_in_any_order(layout):
    x = torch.randn(2, 4, 6, 6, 8)
    x = {
        "channels last": x.movedim(2, -1).contiguous().movedim(-1, 2),
        "every second": x[:, ::2, ::2, 1:, ::2],
        "expanded": x[:1].expand(2, 4, 6, 6, 8),
    }[layout]
    assert torch.equal(
        path_pool2d(x, "max", (2, 2), (2, 2)), path_pool2d_reference(x, "max", (2, 2), (2, 2))
    )


def test_the_greatest_and_what_is_none():
    """NaN is the maximum wherever it stands in the window; −inf stays; padding never wins."""
    x = torch.full((1, 4, 1, 2, 2), -5.0)
    x[0, 0, 0, 0, 0] = float("nan")
    x[0, 1, 0, 1, 1] = float("nan")
    x[0, 1, 0, 0, 0] = float("inf")
    x[0, 2] = float("-inf")
    for window in (((2, 2), (2, 2), (0, 0)), ((2, 2), (1, 1), (1, 1))):
        got, expected = path_pool2d(x, "max", *window), path_pool2d_reference(x, "max", *window)
        assert torch.equal(got.nan_to_num(nan=123.0), expected.nan_to_num(nan=123.0))
    assert got[0, 3].max() == -5.0


def test_means_let_nan_and_infinity_through():
    x = torch.zeros(1, 1, 2, 2, 4)
    x[0, 0, 0, 0, 0], x[0, 0, 1, 1, 3] = float("nan"), float("inf")
    torch.testing.assert_close(
        path_pool2d(x, "avg", (2, 2), (2, 2)),
        path_pool2d_reference(x, "avg", (2, 2), (2, 2)),
        equal_nan=True,
    )


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 4), (2, 0, 3, 4, 4), (2, 2, 0, 4, 4)])
def test_nothing_in_nothing_out(shape):
    assert path_pool2d(torch.randn(shape), "max", (2, 2), (2, 2)).shape == (*shape[:3], 2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_memory(dtype):
    x = torch.randn(2, 2, 3, 4, 4).to(dtype)
    assert torch.equal(
        path_pool2d(x, "max", (2, 2), (2, 2)), path_pool2d_reference(x, "max", (2, 2), (2, 2))
    )
    got, referee = (
        path_pool2d(x, "avg", (2, 2), (2, 2)),
        path_pool2d_reference(x.double(), "avg", (2, 2), (2, 2)),
    )
    assert got.dtype == dtype
    assert (got.double() - referee).abs().max() <= torch.finfo(dtype).eps * referee.abs().max()


BAD = {
    "kind": ({"kind": "min"}, "kind is 'min'.*max, avg"),
    "axes": ({"x": torch.randn(2, 3, 4, 4)}, r"x has shape \[2, 3, 4, 4\].*\[T, N, C, H, W\]"),
    "kernel": ({"kernel": (0, 2)}, r"kernel is \(0, 2\)"),
    "stride": ({"stride": (2.0, 2)}, r"stride is \(2.0, 2\)"),
    "padding": ({"padding": (2, 0)}, r"padding is \[2, 0\].*half the kernel \[2, 2\]"),
    "no room": ({"kernel": (5, 2)}, r"window of \[5, 2\] does not fit into images of \[4, 4\]"),
    "integers": ({"x": torch.ones(2, 2, 3, 4, 4, dtype=torch.int32)}, "dtype torch.int32"),
    "gradient": ({"x": torch.randn(2, 2, 3, 4, 4, requires_grad=True)}, "x requires a gradient"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    changed, message = BAD[name]
    given = {
        "x": torch.randn(2, 2, 3, 4, 4),
        "kind": "max",
        "kernel": (2, 2),
        "stride": (2, 2),
        **changed,
    }
    with pytest.raises(ModeconnError, match=message):
        path_pool2d(**given)
