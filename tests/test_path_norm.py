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
    path_batch_norm,
    path_batch_norm_reference,
    path_batch_statistics,
    path_batch_statistics_reference,
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


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize(
    "shape", [(3, 2, 5), (1, 3, 65, 7), (2, 5, 3, 6, 9), (1, 1025, 2), (2, 3, 1, 1, 1)], ids=str
)
def test_statistics(shape, offset):
    """More rows than lanes, than programs of rows; fewer; a mean far from zero."""
    scale = torch.rand(shape[2]).view(-1, *[1] * (len(shape) - 3)) + 0.1
    check(
        path_batch_statistics, path_batch_statistics_reference, torch.randn(shape) * scale + offset
    )


def test_statistics_of_several_programs(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 64)
    x = torch.randn(2, 7, 3, 5, 5) + 100
    check(path_batch_statistics, path_batch_statistics_reference, x)
    assert all(map(torch.equal, path_batch_statistics(x), path_batch_statistics(x)))


@pytest.mark.parametrize("layout", ["channels last", "every second", "transposed", "expanded"])
def test_statistics_of_memory_in_any_order(layout):
    x = torch.randn(2, 4, 6, 5, 8)
    x = {
        "channels last": x.movedim(2, -1).contiguous().movedim(-1, 2),
        "every second": x[:, ::2, ::2, 1:, ::2],
        "transposed": x.transpose(0, 1),
        "expanded": x[:, :1].expand(2, 4, 6, 5, 8),
    }[layout]
    check(path_batch_statistics, path_batch_statistics_reference, x)


def test_equal_values_have_no_variance():
    mean, var = path_batch_statistics(torch.full((2, 5, 3, 7), 0.1))
    assert (mean == torch.tensor(0.1)).all() and (var == 0).all()


def test_what_is_not_finite_stays_in_its_channel():
    x = torch.randn(2, 5, 3, 7)
    x[0, 0, 0, 0], x[0, 3, 1, 2], x[1, 4, 2, 6] = float("nan"), float("inf"), float("nan")
    bad = torch.tensor([[True, True, False], [False, False, True]])
    assert all(torch.equal(~torch.isfinite(v), bad) for v in path_batch_statistics(x))


def test_statistics_of_nothing_and_of_one_value():
    mean, var = path_batch_statistics(torch.randn(2, 0, 3, 4))
    assert mean.shape == var.shape == (2, 3) and torch.isnan(mean).all() and torch.isnan(var).all()
    x = torch.randn(2, 1, 3)
    mean, var = path_batch_statistics(x)
    assert torch.equal(mean, x[:, 0].double()) and torch.isnan(var).all()
    assert path_batch_statistics(torch.randn(0, 4, 3))[0].shape == (0, 3)
    assert path_batch_statistics(torch.randn(2, 4, 0, 5))[1].shape == (2, 0)


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 3, 66, 4, 5), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("activation", ["identity", "leaky_relu"])
def test_batch_norm(shape, activation):
    x, weight, bias = (
        torch.randn(shape) * 3 + 20,
        blended(2, shape[0], shape[2]),
        blended(1, shape[0], shape[2]),
    )
    check(path_batch_norm, path_batch_norm_reference, x, weight, bias, 1e-3, activation=activation)
    check(
        path_batch_norm,
        path_batch_norm_reference,
        x.movedim(1, -1).contiguous().movedim(-1, 1),
        None,
        activation=activation,
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
    "one value": (path_batch_norm, {"x": torch.randn(2, 1, 5)}, "at least two values per channel"),
    "activation": (path_batch_norm, {"activation": "swish"}, "activation is 'swish'"),
    "channels": (
        path_batch_norm,
        {"weight": blended(2, 2, 4)},
        r"weight has shape \[4\].*expected \[5\]",
    ),
    "no channels": (path_batch_norm, {"x": torch.randn(2, 5)}, r"x has shape \[2, 5\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    function, changed, message = BAD[name]
    given = {"x": torch.randn(2, 4, 5), "weight": blended(2, 2, 5), **changed}
    with pytest.raises(ModeconnError, match=message):
        function(**given)
