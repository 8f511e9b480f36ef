"""The engine's chains of layers against PyTorch, by the tolerance of policy.py."""

import numpy as np
import pytest
import torch

from native_cases import engine
from native_chain_cases import (
    ACTIVATIONS,
    DTYPES,
    ISAS,
    PLAIN,
    known,
    make,
    outputs,
    reference,
    sums,
)
from policy import assert_within_policy


def check_outputs(case, isa, dtype, **options):
    plain, exact = (reference(case, precision) for precision in (PLAIN[dtype], torch.float64))
    check_known((case, plain, exact), isa, dtype, **options)


def check_known(known_case, isa, dtype, **options):
    case, plain, exact = known_case
    got = outputs(case, isa, **options)
    assert_within_policy("outputs", got, plain, exact, PLAIN[dtype])


SHAPES = [  # rows, widths, points
    (1, (1, 1), 1),
    (2, (3, 2, 1), 3),
    (63, (7, 63, 3), 3),
    (1025, (63, 7, 2), 2),
    (64, (245, 245, 10), 2),
    (63, (1025, 63, 1025, 7), 1),
    (7, (2, 1, 3), 1000),
    (2, (1025, 245, 245, 63), 3),
    (100, (12, 13, 25), 2),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,widths,points", SHAPES, ids=lambda v: str(v).replace(" ", ""))
def test_outputs(isa, dtype, rows, widths, points):
    check_known(known(dtype, rows, widths, points), isa, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 7, 63, 245, 1025])
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 1025])
def test_odd_shapes_strided_and_unaligned(isa, dtype, width, rows):
    check_known(known(dtype, rows, (width, 5, width), 2, pad=3), isa, dtype, threads=2, pad=2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("blocks", [1, 3])
def test_biases_with_coefficients_of_their_own(isa, blocks):
    case = make(65, (9, 33, 5), 4, np.float32)
    rng = np.random.default_rng(2)
    for layer in case["layers"]:
        layer["biases"] = [
            rng.standard_normal(len(layer["weights"][0]), dtype=np.float32) for _ in range(blocks)
        ]
        layer["bias_coefficients"] = rng.standard_normal((4, blocks))
    check_outputs(case, isa, "float32")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa, dtype, activation):
    check_outputs(
        make(65, (9, 33, 17, 5), 3, DTYPES[dtype], activation=activation, first=activation),
        isa,
        dtype,
    )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_on_the_whole_range(isa, dtype, activation):
    x = np.concatenate(
        [
            np.linspace(-30, 30, 6001),
            np.logspace(-30, 2, 500),
            -np.logspace(-30, 2, 500),
            [0.0, -0.0, 700.0, -700.0],
        ]
    )
    x = x.astype(DTYPES[dtype])[:, None]
    out = np.full((1, *x.shape), np.nan, x.dtype)
    engine.chain_outputs([x], np.ones((1, 1)), [], out, activation=activation, slope=0.125, isa=isa)
    exact = ACTIVATIONS[activation](torch.from_numpy(x).double())
    if dtype == "float32":  # element by element, relative
        plain = ACTIVATIONS[activation](torch.from_numpy(x))
        error = (torch.from_numpy(out[0]).double() - exact).abs()
        allowed = (
            2 * (plain.double() - exact).abs() + 4 * np.finfo(np.float32).eps * exact.abs() + 1e-37
        )
        if "gelu" in activation:  # in the negative tail PyTorch's own error is absolute
            allowed = allowed + 4 * np.finfo(np.float32).eps * torch.from_numpy(
                x
            ).double().abs().clamp(max=8)
    else:
        error = (torch.from_numpy(out[0]) - exact).abs()
        allowed = (
            8
            * np.finfo(np.float64).eps
            * torch.maximum(exact.abs(), torch.from_numpy(x).abs().clamp(max=1) * 0.5)
            + 1e-300
        )
    assert (error <= allowed).all(), (
        x[(error > allowed).numpy()][:5],
        error[error > allowed][:5],
        allowed[error > allowed][:5],
    )
    special = np.array([[np.nan], [np.inf], [-np.inf]], x.dtype)
    out = np.zeros((1, 3, 1), x.dtype)
    engine.chain_outputs(
        [special], np.ones((1, 1)), [], out, activation=activation, slope=0.125, isa=isa
    )
    limits = ACTIVATIONS[activation](torch.from_numpy(special).double()).numpy()
    np.testing.assert_allclose(out[0], limits, rtol=np.finfo(x.dtype).eps)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_sigmoid_at_extremes(isa, dtype):
    """Against float64; below the smallest normal number a value may count as zero."""
    smallest = np.finfo(DTYPES[dtype]).smallest_subnormal
    inputs = [np.nan, np.inf, 1e4, 40.0, 1.0, smallest, 0.0]
    x = np.array([inputs, [-value for value in inputs]], DTYPES[dtype]).reshape(-1, 1)
    out = np.zeros((1, *x.shape), x.dtype)
    engine.chain_outputs([x], np.ones((1, 1)), [], out, activation="log_sigmoid", isa=isa)
    exact = torch.nn.functional.logsigmoid(torch.from_numpy(x).double()).numpy()
    info = np.finfo(DTYPES[dtype])
    np.testing.assert_allclose(out[0], exact, rtol=4 * info.eps, atol=info.smallest_normal)


def test_no_rows_and_no_points():
    case = make(0, (4, 3), 2, np.float32)
    assert (sums(case, np.zeros(0, np.int64), "") == 0).all()
    case = make(3, (4, 3), 0, np.float32)
    assert sums(case, np.zeros(3, np.int64), "").shape == (0, 3)


def test_a_plain_product_on_any_layout():
    rng = np.random.default_rng(0)
    x, w, b = (
        rng.standard_normal((100, 91)).astype(np.float32),
        rng.standard_normal((33, 91)).astype(np.float32),
        np.ones(33, np.float32),
    )
    out = np.full((100, 1, 33), np.nan, np.float32).transpose(1, 0, 2)
    one = np.ones((1, 1))
    engine.chain_outputs(
        [x[::-1]], one, [dict(weights=[w], biases=[b], coefficients=one)], out, threads=2
    )
    np.testing.assert_allclose(
        out[0], x[::-1].astype(float) @ w.T.astype(float) + 1, rtol=1e-5, atol=1e-4
    )
