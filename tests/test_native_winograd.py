"""3 × 3 convolutions by Winograd's F(2 × 2, 3 × 3): values, where it is taken, non-finite data."""

import numpy as np
import pytest
import torch

from image_cases import PLAIN, Maker, check, outputs, reference
from native_chain_cases import ACTIVATIONS, DTYPES, ISAS
from policy import assert_within_policy

every = lambda f: pytest.mark.parametrize("isa", ISAS)(pytest.mark.parametrize("dtype", DTYPES)(f))

# Channels, units, image and padding of 3 × 3 convolutions, odd ones included, that the engine
# computes by Winograd.
SQUARES = [
    (16, 16, (16, 16), 1),
    (31, 25, (7, 8), 1),
    (64, 64, (7, 7), 1),
    (40, 46, (6, 7), 1),
    (64, 64, (4, 4), 1),
    (20, 20, (8, 8), 1),
    (24, 20, (10, 6), 0),
    (48, 31, (9, 9), 0),
    (16, 24, (6, 6), 0),
    (32, 13, (40, 8), 1),
]
DIRECT = [
    (3, 64, (32, 32), 1),
    (16, 16, (7, 7), 1),
    (64, 64, (2, 2), 1),
    (64, 64, (5, 5), 1),
    (7, 25, (16, 16), 1),
]


def convolution(channels, out, image, padding, dtype="float32", points=2, rows=33, **options):
    return Maker(rows, (channels, *image), points, dtype).conv(
        out, padding=(padding, padding), **options
    )


@every
@pytest.mark.parametrize("shape", SQUARES, ids=str)
def test_winograd(isa, dtype, shape):
    """Alone, with a norm, before poolings of paired rows or not, with an activation apart."""
    check(convolution(*shape, dtype), isa, dtype, threads=2)
    check(
        convolution(*shape, dtype, rows=3, norm=True, pad=1, blocks=3).pool("max", (2, 2)),
        isa,
        dtype,
    )
    check(
        convolution(*shape, dtype, rows=3, bias=False).pool("avg", (2, 1), stride=(3, 2)),
        isa,
        dtype,
    )
    check(convolution(*shape, dtype, rows=3, activation="gelu").pool("max", (3, 2)), isa, dtype)


@every
@pytest.mark.parametrize("activation", ["leaky_relu", "tanh"])
def test_winograd_with_a_value_added(isa, dtype, activation):
    maker = convolution(3, 40, (7, 6), 1, dtype)
    layers = maker.conv(40, padding=(1, 1), activation=activation).case["layers"]
    got = outputs(dict(maker.case, layers=[layers[0], dict(layers[1], add=0)]), isa)[0]
    act, plain = ACTIVATIONS[activation], {}
    for kind in (PLAIN[dtype], torch.float64):
        first = reference(dict(maker.case, layers=layers[:1]), kind)
        plain[kind] = act(
            first
            + reference(
                dict(maker.case, layers=[layers[0], dict(layers[1], activation="identity")]), kind
            )
        )
    assert_within_policy("outputs", got, plain[PLAIN[dtype]], plain[torch.float64], PLAIN[dtype])


def leaks(shape, isa):
    """Whether a large pixel under zero weights changes last digits: in Winograd's sums it does."""
    maker = convolution(*shape, points=1, rows=1, activation="identity", blocks=1)
    maker.case["layers"][0]["weights"][0][:, :, (1, 2)] = maker.case["layers"][0]["weights"][0][
        :, :, :, (1, 2)
    ] = 0
    _, out, (h, w), padding = shape
    pixels = []
    for _ in range(2):
        pixels.append(
            outputs(maker.case, isa)[0]
            .reshape(out, h + 2 * padding - 2, w + 2 * padding - 2)[:, 1, 1]
            .tobytes()
        )
        maker.case["terms"][0][0, :, 2 - padding, 2 - padding] = 1e6
    return pixels[0] != pixels[1]


@pytest.mark.parametrize("isa", ISAS)
def test_where_winograd_is_taken(isa):
    assert [leaks(shape, isa) for shape in SQUARES] == [True] * len(SQUARES)
    assert [leaks(shape, isa) for shape in DIRECT] == [False] * len(DIRECT)


@every
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_in_their_place_by_winograd(isa, dtype, value):
    """Infinities in an input, then in a weight: in Winograd's squares they would become NaN."""
    for padding, weight in ((1, False), (0, True)):
        maker = convolution(40, 46, (10, 8), padding, dtype, activation="identity")
        maker.pool("max", (2, 2)).conv(24, padding=(padding, padding), activation="identity")
        maker.case["terms"][0][5, 1, 2, 3] = maker.case["terms"][0][32, 0, 9, 7] = value
        if weight:
            maker.case["layers"][0]["weights"][0][7, 3, 1, 2] = value
        got, want = outputs(maker.case, isa)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want.numpy()))
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want.numpy()))


@every
def test_large_values_by_winograd(isa, dtype):
    """Inputs whose sums are too large only in a square's transform."""
    maker = convolution(40, 46, (7, 8), 1, dtype, points=1, activation="identity", blocks=1)
    top = np.finfo(DTYPES[dtype]).max
    maker.case["terms"][:] = [
        np.where(v > 0, top, -top).astype(DTYPES[dtype]) for v in maker.case["terms"]
    ]
    maker.case["layers"][0]["weights"][0][:] *= DTYPES[dtype](1e-2)
    check(maker, isa, dtype)
