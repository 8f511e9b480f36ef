"""Graphs of engine steps that read and add earlier values, against PyTorch; losses of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from native_chain_cases import DTYPES, ISAS, PLAIN, engine
from native_graph_cases import Net
from policy import assert_within_policy

every = lambda f: pytest.mark.parametrize("isa", ISAS)(pytest.mark.parametrize("dtype", DTYPES)(f))


@every
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 257])
def test_residual_rows(isa, dtype, rows):
    net = Net(rows, (7,), dtype=dtype)
    first = net.product(7, activation="tanh", norm=True)
    net.product(63, activation="gelu")
    second = net.product(7, add=first)
    net.add(second, -1, second, activation="silu")
    last = net.add(second, first, first)  # a panel that is read twice is given back once
    net.product(7, read=second, add=last)
    net.product(7, read=last)
    more = net.more_terms(7, activation="relu")
    net.product(7, read=second, add=more, activation="leaky_relu")
    net.product(3, activation="identity")
    net.check(isa, dtype, threads=2)


@every
@pytest.mark.parametrize("width", [1, 245, 1025])
def test_wide_residual_rows_in_parts(isa, dtype, width):
    """A layer that does not fit the caches adds its skip with the first part of its depth."""
    net = Net(33, (width,), points=2, dtype=dtype)
    net.product(1025)
    net.product(width, add=-1)
    net.product(width, add=1)
    net.check(isa, dtype)


@every
@pytest.mark.parametrize("rows", [0, 1, 35])
def test_residual_images(isa, dtype, rows):
    """A residual network: a shortcut, a strided 1 × 1 convolution as one, means over pixels."""
    net = Net(rows, (3, 7, 6), dtype=dtype)
    first = net.product(5, padding=(1, 1), norm=True)
    net.product(5, padding=(1, 1), norm=True)
    second = net.product(5, padding=(1, 1), norm=True, add=first)
    half = net.product(9, padding=(1, 1), stride=(2, 2), norm=True)
    last = net.product(9, padding=(1, 1), norm=True, activation="identity")
    net.product(9, read=second, kernel=(1, 1), stride=(2, 2), norm=True, add=last)
    net.add(half, half + 2, activation="sigmoid")
    net.pool("avg", net.values[-1][1:])
    flat = net.flatten()
    net.product(9, activation="relu")
    net.product(9, add=flat, activation="identity")
    net.check(isa, dtype, threads=2)


@every
def test_an_added_value_before_a_pooling_on_the_way_and_terms_later(isa, dtype):
    net = Net(19, (4, 8, 8), dtype=dtype)
    net.product(4, padding=(1, 1))
    net.product(4, padding=(1, 1), add=-1)
    net.pool("max", (2, 2))
    more = net.more_terms(4, 8, 8, activation="relu")
    pooled = net.pool("avg", (2, 2), read=more)
    net.product(4, read=2, padding=(1, 1), add=pooled, activation="tanh")
    net.pool("max", (3, 3), stride=(1, 1), padding=(1, 1))
    net.check(isa, dtype)


@every
@pytest.mark.parametrize("rows", [0, 1, 35])
def test_norms_before_convolutions(isa, dtype, rows):
    """As in a residual network whose norms come first."""
    net = Net(rows, (3, 7, 6), dtype=dtype)
    first = net.product(5, padding=(1, 1), activation="identity")
    net.affine(activation="relu")
    net.product(5, padding=(1, 1), norm=True)
    second = net.product(5, padding=(1, 1), add=first, activation="identity")
    net.affine(activation="gelu")
    net.product(5, padding=(1, 1))
    net.affine(add=second, activation="leaky_relu")
    net.pool("avg", net.values[-1][1:])
    net.flatten()
    net.affine(activation="tanh")
    net.product(9, activation="identity")
    net.check(isa, dtype, threads=2)


@every
@pytest.mark.parametrize("rows", [0, 1, 35])
@pytest.mark.parametrize("shape", [(4, 7, 6), (7,)], ids=str)
def test_values_side_by_side_and_parts_of_them(isa, dtype, rows, shape):
    """As in a dense network."""
    net = Net(rows, shape, dtype=dtype)
    window = {"padding": (1, 1)} if len(shape) == 3 else {}
    net.affine(activation="relu")
    first = net.product(3, **window)
    second = net.concat(-1, first)
    net.product(17, **window)
    third = net.concat(second, second + 1, first, activation="silu")
    part = net.take([0, 2, 3, 11, 12, 3], third, activation="relu")
    net.product(6, add=part, **window)
    net.concat(net.take([1], second), net.take(list(range(1, 6)), part + 1))
    if len(shape) == 3:
        net.flatten()
    net.product(5)
    net.check(isa, dtype, threads=2)


@every
@pytest.mark.parametrize("rows", [0, 1, 35])
@pytest.mark.parametrize("shape", [(5, 7, 6), (5,), (3, 1, 1)], ids=str)
def test_products_of_values(isa, dtype, rows, shape):
    """Gates: of one shape, and of channels."""
    net = Net(rows, shape, dtype=dtype)
    window = {"padding": (1, 1)} if len(shape) == 3 else {}
    first = net.product(shape[0], activation="sigmoid", **window)
    last = net.multiply(-1, first, activation="tanh")
    if len(shape) == 3:
        net.pool("avg", shape[1:])
        net.product(2, kernel=(1, 1))
        gate = net.product(shape[0], kernel=(1, 1), activation="hardsigmoid")
        net.multiply(last, gate, activation="relu")
        net.flatten()
    net.multiply(len(net.layers) - 1, len(net.layers) - 1)
    net.product(3)
    net.check(isa, dtype, threads=2)


@every
@pytest.mark.parametrize("rows", [0, 1, 35])
@pytest.mark.parametrize("shape", [(12, 7, 6), (12,), (1020,)], ids=str)
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_group_norms(isa, dtype, rows, shape, groups):
    net = Net(rows, shape, dtype=dtype)
    if shape != (12,) or groups < 12:  # a group of one value is its shift
        net.group_norm(groups, activation="relu")
    net.product(12, **({"padding": (1, 1)} if len(shape) == 3 else {}), activation="identity")
    net.group_norm(min(groups, 6), eps=0.1, activation="gelu")
    if len(shape) == 3:
        net.flatten()
    net.product(5)
    net.check(isa, dtype, threads=2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(4, 32, 32), (1024,)], ids=str)
def test_a_group_norm_keeps_the_digits_of_values_far_from_zero(isa, shape):
    net = Net(20, shape, points=1)
    net.terms, net.coefficients = [1000 + net.draw(20, *shape)], np.ones((1, 1))
    net.group_norm(2)
    if len(shape) == 3:
        net.flatten()
    np.testing.assert_allclose(net.outputs(isa), net.reference(torch.float64), atol=1e-4)


@every
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": (2, 3)}, {"stride": (1, 2), "padding": (1, 0)}, {"stride": (3, 3)}],
    ids=str,
)
@pytest.mark.parametrize("size", [(7, 6), (8, 9), (2, 4)], ids=str)
def test_poolings_that_round_up(isa, dtype, options, size):
    net = Net(17, (3, *size), dtype=dtype)
    net.product(5, padding=(1, 1))
    net.pool("max", (2, 3), ceil=True, **options)
    net.flatten()
    net.product(4)
    net.check(isa, dtype)


@every
def test_channels_of_zeros_and_every_other_pixel(isa, dtype):
    """As on the shortcut of a residual network without weights there."""
    net = Net(19, (3, 7, 8), dtype=dtype)
    first = net.product(4, padding=(1, 1))
    half = net.product(8, padding=(1, 1), stride=(2, 2), activation="identity")
    net.pool("avg", (1, 1), read=first, stride=(2, 1))
    net.pool("avg", (1, 1), stride=(1, 2))
    wide = net.take([-1, -1, 0, 1, 2, 3, -1, -1])
    net.add(half, wide, activation="relu6")
    net.flatten()
    net.check(isa, dtype)


@every
@pytest.mark.parametrize("groups", [1, 2, 6, 12])
@pytest.mark.parametrize(
    "window",
    [
        {},
        {"dilation": (2, 1)},
        {"dilation": (1, 3), "padding": (1, 3)},
        {"stride": (2, 1), "padding": (4, 4), "dilation": (3, 4)},
    ],
    ids=str,
)
def test_groups_and_dilations(isa, dtype, groups, window):
    net = Net(17, (12, 9, 10), points=2, dtype=dtype)
    net.product(24, groups=groups, norm=True, **window)
    net.product(12, groups=groups, kernel=(1, 1))
    net.product(12, groups=12, norm=True, **window)  # depthwise
    net.product(12, groups=12, kernel=(1, 1), activation="gelu")
    net.check(isa, dtype)


@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.integers(1, 8),
    image=st.booleans(),
    isa=st.sampled_from(ISAS),
)
@settings(max_examples=60, deadline=None)
def test_any_graph(seed, steps, image, isa):
    """Steps that read and add any earlier value that fits."""
    rng = np.random.default_rng(seed)
    net = Net(
        int(rng.integers(1, 40)),
        (int(rng.integers(1, 9)), 6, 5) if image else (int(rng.integers(1, 40)),),
        2,
        "float64",
        seed,
    )
    for _ in range(steps):
        read = int(rng.integers(-1, len(net.layers)))
        shape = net.values[read + 1]
        alike = [i - 1 for i, other in enumerate(net.values) if other == shape]
        beside = [i - 1 for i, other in enumerate(net.values) if other[1:] == shape[1:]]
        kind = rng.integers(0, 9 if image else 8)
        if kind == 4:
            net.affine(
                read,
                int(rng.choice(alike)) if rng.integers(0, 2) else None,
                str(rng.choice(["relu", "tanh"])),
            )
        elif kind == 3:
            net.take(
                sorted(
                    rng.choice(shape[0], int(rng.integers(1, shape[0] + 1)), replace=False).tolist()
                ),
                read,
            )
        elif kind == 6:
            net.group_norm(
                int(rng.choice([g for g in range(1, shape[0] + 1) if shape[0] % g == 0])), read, 0.1
            )
        elif kind == 5:
            net.concat(*rng.choice(beside, int(rng.integers(1, 4))).tolist())
        elif kind == 0:
            net.add(
                *rng.choice(alike, int(rng.integers(1, 4))).tolist(),
                activation=str(rng.choice(["identity", "gelu", "relu"])),
            )
        elif kind == 7:
            net.multiply(read, int(rng.choice(alike)), activation="tanh")
        elif kind == 8 and min(shape[1:]) > 1:
            net.pool(
                str(rng.choice(["max", "avg"])), (2, 2), read, stride=(int(rng.integers(1, 3)), 1)
            )
        else:
            add = int(rng.choice(alike)) if rng.integers(0, 2) else None
            out = shape[0] if add is not None else int(rng.integers(1, 20))
            window = {"padding": (1, 1)} if image else {}
            net.product(
                out,
                read,
                add,
                str(rng.choice(["identity", "relu", "tanh"])),
                norm=bool(rng.integers(0, 2)),
                **window,
            )
    if image:
        net.flatten()
        net.product(3)
    net.check(isa, "float64")
    assert net.outputs(isa, threads=3).tobytes() == net.outputs(isa).tobytes()


@every
@pytest.mark.parametrize("rows,width", [(1, 1), (63, 10), (257, 7), (100, 245)])
def test_bce_sums(isa, dtype, rows, width):
    net = Net(rows, (width,), dtype=dtype)
    targets = np.where(
        net.rng.random((rows, width)) < 0.5,
        net.rng.integers(0, 2, (rows, width)),
        net.rng.random((rows, width)),
    )
    targets = targets.astype(net.dtype)
    got = engine.chain_sums(net.terms, net.coefficients, [], targets, loss="bce", isa=isa)

    def sums(dtype):
        y = torch.from_numpy(targets).to(dtype)
        each = [
            F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1).double().sum()
            for x in net.reference(dtype)
        ]
        return torch.stack(each)

    # The values are of the precision, whatever they are summed up in: so is the floor.
    assert_within_policy("sums", got[:, 0], sums(PLAIN[dtype]), sums(torch.float64), PLAIN[dtype])
    wrong = (
        ((net.reference(torch.float64) > 0) != torch.from_numpy(targets > 0.5))
        .double()
        .mean(2)
        .sum(1)
    )
    np.testing.assert_allclose(got[:, 1], wrong, atol=1e-9)
    assert (got[:, 2] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_bce_of_large_and_non_finite_logits(isa, target):
    x = np.array(
        [[100.0], [-100.0], [1e4], [-1e4], [0.0], [-0.0], [np.nan], [np.inf], [-np.inf]], np.float32
    )
    y = torch.full((1, 1), target)
    for row in x:
        got = engine.chain_sums([row[None]], np.ones((1, 1)), [], y.numpy(), loss="bce", isa=isa)[
            0, 0
        ]
        want = F.binary_cross_entropy_with_logits(
            torch.from_numpy(row[None]).double(), y.double()
        ).item()
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-30)
