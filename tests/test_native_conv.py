"""Convolutions and pooling in the engine's chains against PyTorch, by policy.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from image_cases import Maker, check, outputs, reference, vgg
from native_chain_cases import ACTIVATIONS, DTYPES, ISAS, engine

every = lambda f: pytest.mark.parametrize("isa", ISAS)(pytest.mark.parametrize("dtype", DTYPES)(f))


@every
@pytest.mark.parametrize("channels", [1, 3, 7, 17, 63])
@pytest.mark.parametrize("out", [1, 7, 25])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (8, 8)])
def test_channels_and_sizes(isa, dtype, channels, out, size):
    check(Maker(33, (channels, *size), 2, dtype).conv(out, padding=(1, 1)), isa, dtype)


@every
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (3, 1), (2, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0)])
def test_kernels_strides_and_paddings(isa, dtype, kernel, stride, padding):
    check(Maker(9, (3, 8, 9), 2, dtype).conv(4, kernel, stride, padding), isa, dtype)
    check(
        Maker(9, (3, 8, 9), 1, dtype).conv(4, kernel, stride, padding).pool("max", (2, 1)),
        isa,
        dtype,
    )


@every
@pytest.mark.parametrize("op", ["max", "avg"])
@pytest.mark.parametrize(
    "kernel,options",
    [
        ((2, 2), {}),
        ((3, 2), {}),
        ((3, 3), dict(stride=(2, 2))),
        ((3, 3), dict(stride=(2, 1), padding=(1, 1))),
        ((2, 2), dict(stride=(3, 2))),
        ((1, 1), {}),
        ((5, 7), {}),
        ((2, 3), dict(padding=(1, 1))),
    ],
)
def test_pooling_alone_behind_a_convolution_and_twice(isa, dtype, op, kernel, options):
    check(Maker(33, (3, 5, 7), 2, dtype, first="relu").pool(op, kernel, **options), isa, dtype)
    check(
        Maker(3, (3, 5, 7), 2, dtype).conv(5, padding=(1, 1)).pool(op, kernel, **options),
        isa,
        dtype,
    )
    check(
        Maker(3, (3, 10, 14), 2, dtype).pool("avg", (2, 2)).pool(op, kernel, **options), isa, dtype
    )


@every
@pytest.mark.parametrize("rows", [0, 1, 2, 33, 100])
@pytest.mark.parametrize("points", [1, 3])
def test_a_whole_chain(isa, dtype, rows, points):
    check(vgg(rows, (3, 9, 6), points, dtype, terms=3, first="relu", pad=5), isa, dtype, threads=2)


@every
def test_larger_images(isa, dtype):
    check(vgg(5, (3, 32, 32), 2, dtype), isa, dtype)
    check(
        Maker(3, (16, 32, 32), 2, dtype, first="relu")
        .pool("max", (2, 2))
        .conv(32, padding=(1, 1))
        .pool("max", (2, 2)),
        isa,
        dtype,
    )
    check(
        Maker(2, (65, 40, 40), 1, dtype)
        .conv(3, padding=(1, 1))
        .pool("avg", (40, 40))
        .flatten(3)
        .linear(7),
        isa,
        dtype,
    )  # rows in chunks


@every
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(isa, dtype, activation):
    maker = (
        Maker(33, (3, 5, 4), 2, dtype, first=activation)
        .pool("avg", (2, 1))
        .conv(14, activation=activation, padding=(1, 1))
        .pool("max", (2, 2))
    )
    check(maker.conv(3, (1, 1), activation=activation), isa, dtype)


@every
def test_strided_kernels_norms_and_missing_biases(isa, dtype):
    maker = (
        Maker(20, (3, 7, 7), 3, dtype)
        .conv(13, pad=2, norm=True, blocks=3)
        .conv(7, bias=False, norm=True)
        .conv(5, bias=False, pad=1)
    )
    maker.case["layers"][0].update(biases=[maker.draw(13)], bias_coefficients=maker.mix(1))
    check(maker, isa, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_in_their_place(isa, value):
    maker = (
        Maker(33, (2, 6, 6), 1, "float32")
        .pool("max", (2, 2))
        .conv(4, padding=(1, 1), activation="identity")
        .pool("max", (3, 3))
    )
    maker.case["terms"][0][5, 1, 2, 3] = maker.case["terms"][0][32, 0, 5, 5] = value
    got, want = outputs(maker.case, isa)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want.numpy()))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want.numpy()))
    alone = Maker(33, (2, 5, 5), 1, "float32", first="relu").pool(
        "max", (3, 3), stride=(2, 2), padding=(1, 1)
    )
    alone.case["terms"][0][7, 0, :3, :3] = value
    got, want = outputs(alone.case, isa)
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("isa", ISAS)
def test_sums_and_threads(isa):
    case = vgg(777, (3, 6, 6), 5, "float32").case
    labels = np.arange(777) % 5
    sums = lambda threads: engine.chain_sums(
        case["terms"],
        case["coefficients"],
        case["layers"],
        labels,
        top5=True,
        isa=isa,
        threads=threads,
    )
    one, exact = sums(1), reference(case, torch.float64)
    loss = torch.stack(
        [F.cross_entropy(z, torch.from_numpy(labels), reduction="sum") for z in exact]
    )
    np.testing.assert_allclose(one[:, 0], loss, rtol=1e-5)
    np.testing.assert_allclose(
        one[:, 1], (exact.argmax(2) != torch.from_numpy(labels)).sum(1), atol=1
    )
    for threads in (2, 5):
        assert sums(threads).tobytes() == one.tobytes()


def test_no_points_and_images_without_steps():
    case = vgg(3, (3, 4, 4), 0, "float32").case
    assert engine.chain_sums(
        case["terms"], case["coefficients"], case["layers"], np.zeros(3, np.int64)
    ).shape == (0, 3)
    check(Maker(9, (3, 4, 5), 2, "float32").flatten(60).linear(4), "", "float32")
    check(Maker(9, (3, 4, 5), 2, "float32"), "", "float32")


def layers(*which):
    maker = Maker(2, (3, 4, 5), 1, "float32").conv(6).pool("max", (2, 2)).flatten(6).linear(4)
    return [
        maker.case["layers"][i] if isinstance(i, int) else dict(maker.case["layers"][i[0]], **i[1])
        for i in which
    ]


BAD = {
    "op": (
        layers((0, dict(op="conv3d"))),
        r"layers\[0\].op must be linear, conv2d, .* got 'conv3d'",
    ),
    "no flatten": (
        layers(0, 1, 3),
        r"layers\[2\]: linear must come after flatten, got images of \[6, 1, 1\]",
    ),
    "conv on rows": (layers(0, 1, 2, 0), r"layers\[3\]: conv2d must get images"),
    "channels": (
        layers(0, 0),
        r"layers\[1\].weights\[0\] must be \[any, 6, any, any\] float32, got \[6, 3, 3, 3\]",
    ),
    "dilation": (
        layers((1, dict(dilation=(1, 1)))),
        r"\(max_pool2d\) has an unknown key 'dilation'",
    ),
    "unknown key": (
        layers(0, (1, dict(activation="relu"))),
        r"\(max_pool2d\) has an unknown key 'activation'",
    ),
    "stride": (
        layers((0, dict(stride=(0, 1)))),
        r"stride must be two integers of at least 1, got \(0, 1\)",
    ),
    "padding": (
        layers((0, dict(padding=(1, -1)))),
        r"padding must be two integers of at least 0, got \(1, -1\)",
    ),
    "kernel": (
        layers((1, dict(kernel=(2,)))),
        r"kernel must be two integers of at least 1, got \(2,\)",
    ),
    "no kernel": ([dict(op="avg_pool2d")], "must have a kernel"),
    "pool padding": (layers((1, dict(padding=(2, 0)))), "at most half its kernel, got 2 and 2"),
    "too small": (
        layers(0, 1, (1, dict(kernel=(1, 5)))),
        r"layers\[2\]: the kernel must fit the padded image, got kernel 1x5 for 1x1",
    ),
    "weights": (
        layers((0, dict(weights=[np.zeros((6, 3, 3), np.float32)] * 2))),
        r"must be \[any, 3, any, any\] float32, got \[6, 3, 3\]",
    ),
    "contiguous": (
        layers((0, dict(weights=[np.zeros((6, 3, 6, 3), np.float32)[:, :, ::2]] * 2))),
        "contiguous in all dimensions but the first",
    ),
    "empty kernel": (
        layers((0, dict(weights=[np.zeros((6, 3, 0, 3), np.float32)] * 2))),
        "at least one tap",
    ),
    "scale": (layers((0, dict(scale=np.ones((1, 6))))), "both scale and shift or none"),
    "scale shape": (
        layers((0, dict(scale=np.ones((1, 5)), shift=np.ones((1, 6))))),
        r"scale must be \[1, 6\] float64, got \[1, 5\]",
    ),
    "flatten": ([dict(op="flatten", start_dim=1)], r"\(flatten\) has an unknown key 'start_dim'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_layers_are_refused(name):
    case = Maker(2, (3, 4, 5), 1, "float32").case
    with pytest.raises(ValueError, match=BAD[name][1]):
        engine.chain_sums(case["terms"], case["coefficients"], BAD[name][0], np.zeros(2, np.int64))


def test_bad_terms_are_refused():
    zeros, one = lambda *s: np.zeros(s, np.float32), np.ones((1, 1))
    for terms, message in (
        ([zeros(2, 3, 4, 5).transpose(0, 2, 3, 1)], "contiguous in"),
        ([zeros(2, 3, 4, 10)[..., :5]], "contiguous in all dimensions"),
        ([zeros(2, 3, 4)], r"must be \[any, any\]"),
        ([zeros(2, 0, 4, 5)], "at least one value"),
        ([zeros(2, 3, 4, 5), zeros(2, 3, 5, 4)], r"terms\[1\] must be \[2, 3, 4, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.chain_sums(terms, np.ones((1, len(terms))), [], np.zeros(2, np.int64))
    with pytest.raises(ValueError, match=r"out must be \[1, 2, 36\]"):
        engine.chain_outputs([zeros(2, 3, 4, 5)], one, layers(0), zeros(1, 2, 35))
