"""Norms at many points: the kernels in Triton's interpreter against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from policy import assert_within_policy

pytest.importorskip("triton")

from kernel_cases import blended, copied
from modeconn.errors import ModeconnError
from modeconn.kernels import path_norm as module
from modeconn.kernels.path_norm import (
    path_layer_norm,
    path_layer_norm_reference,
    path_rms_norm,
    path_rms_norm_reference,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def check(function: Any, reference: Any, *arguments: Any, **options: Any) -> None:
    """Compare all results with the reference's."""
    got, plain = function(*arguments, **options), reference(*arguments, **options)
    referee = reference(*map(copied, arguments), **options)
    for number, values in enumerate(
        zip(*(v if isinstance(v, tuple) else (v,) for v in (got, plain, referee)))
    ):
        assert_within_policy(f"{function.__name__}, result {number}", *values, torch.float32)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(
    "shape", [(3, 5, 1), (1, 1, 7), (2, 3, 4, 63), (2, 65), (2, 2, 1025)], ids=str
)
def test_rows(shape, offset):
    x, weight, bias = (
        torch.randn(shape) + offset,
        blended(2, shape[0], shape[-1]),
        blended(3, shape[0], shape[-1]),
    )
    check(path_layer_norm, path_layer_norm_reference, x, weight, bias)
    check(path_rms_norm, path_rms_norm_reference, x, weight)


@pytest.mark.parametrize("elements", [4096, 32])
def test_a_mean_far_from_zero_costs_no_digits(monkeypatch, elements):
    monkeypatch.setattr(module, "ELEMENTS", elements)
    x = torch.randn(2, 9, 65) + 3000
    got, referee = path_layer_norm(x, None), path_layer_norm_reference(x.double(), None)
    # Plain PyTorch at the same precision may lose digits here: the floor alone is allowed.
    assert_within_policy("values", got, referee, referee, torch.float32)


def test_rows_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "ELEMENTS", 64)
    x, weight = torch.randn(2, 3, 245) + 30, blended(2, 2, 245)
    check(path_layer_norm, path_layer_norm_reference, x, weight, weight)
    check(path_rms_norm, path_rms_norm_reference, x, weight)
    assert torch.equal(path_layer_norm(x, weight), path_layer_norm(x, weight))


def test_rows_without_weight_or_bias():
    x = torch.randn(2, 3, 7)
    check(path_layer_norm, path_layer_norm_reference, x, None)
    check(path_layer_norm, path_layer_norm_reference, x, None, blended(2, 2, 7))
    check(path_rms_norm, path_rms_norm_reference, x, None)


def test_rows_that_the_points_share():
    x, weight = torch.randn(3, 5, 33), blended(2, 2, 33)
    check(path_layer_norm, path_layer_norm_reference, x, weight, weight, shared=True)
    check(path_layer_norm, path_layer_norm_reference, x[0, 0], None, weight, shared=True)
    check(path_rms_norm, path_rms_norm_reference, x, weight, shared=True)


def test_a_row_of_equal_values():
    """Its variance is 0: eps alone is under the root."""
    check(
        path_layer_norm,
        path_layer_norm_reference,
        torch.full((1, 2, 9), 3.0),
        blended(2, 1, 9),
        blended(2, 1, 9),
        1e-3,
    )


def test_rows_in_any_order_of_memory():
    x, weight = torch.randn(7, 4, 2, 5), blended(2, 2, 4)
    check(path_layer_norm, path_layer_norm_reference, x.permute(2, 0, 3, 1)[:, ::2], weight, weight)
    check(path_rms_norm, path_rms_norm_reference, torch.randn(1, 3, 4).expand(2, 3, 4), weight)


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)], ids=str)
def test_no_rows(shape):
    assert path_layer_norm(torch.randn(shape), blended(2, shape[0], shape[-1])).shape == shape


def test_a_nan_stays_in_its_row():
    x = torch.randn(2, 3, 5)
    x[1, 2, 3] = float("nan")
    got = path_layer_norm(x, None)
    assert (
        torch.isnan(got[1, 2]).all()
        and torch.isfinite(got[0]).all()
        and torch.isfinite(got[1, :2]).all()
    )


BAD = {
    "width": (
        path_layer_norm,
        {"weight": blended(2, 2, 6)},
        r"weight has shape \[6\].*expected \[5\]",
    ),
    "points": (path_layer_norm, {"weight": blended(2, 3, 5)}, "weight has 3 points: expected 2"),
    "shared by whom": (path_layer_norm, {"weight": None, "shared": True}, "shared is True"),
    "no axis": (path_rms_norm, {"x": torch.randn(5), "weight": None}, r"x has shape \[5\]"),
    "float64": (path_rms_norm, {"x": torch.randn(2, 4, 5).double()}, "dtype torch.float64"),
    "gradient": (
        path_rms_norm,
        {"x": torch.randn(2, 4, 5, requires_grad=True)},
        "x requires a gradient",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    function, changed, message = BAD[name]
    given = {"x": torch.randn(2, 4, 5), "weight": blended(2, 2, 5), **changed}
    with pytest.raises(ModeconnError, match=message):
        function(**given)
