"""Convolutions and pooling in the engine's chains against PyTorch, by the same rule as the chains of linear layers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_native_chain import ACTIVATIONS, DTYPES, ISAS, assert_close, combine, engine

PLAIN = {"float32": torch.float32, "float64": torch.float64}


def reference(case, dtype):
    """The chain's outputs [T, N, values] by plain PyTorch at this precision."""
    tensor = lambda a: torch.from_numpy(np.array(a)).to(dtype)
    outputs = []
    for t in range(len(case["coefficients"])):
        x = ACTIVATIONS[case["activation"]](combine([tensor(v) for v in case["terms"]], case["coefficients"][t].tolist()))
        for layer in case["layers"]:
            op = layer.get("op", "linear")
            if op == "flatten":
                x = x.flatten(1)
            elif op == "max_pool2d":
                x = F.max_pool2d(x, layer["kernel"], layer.get("stride"), layer.get("padding", 0))
            elif op == "avg_pool2d":
                x = F.avg_pool2d(x, layer["kernel"], layer.get("stride"), layer.get("padding", 0))
            else:
                w = combine([tensor(v) for v in layer["weights"]], layer["coefficients"][t].tolist())
                cb = layer.get("bias_coefficients", layer["coefficients"])[t].tolist()
                b = combine([tensor(v) for v in layer["biases"]], cb) if layer.get("biases") else None
                x = F.linear(x, w, b) if op == "linear" else F.conv2d(x, w, b, layer.get("stride", 1), layer.get("padding", 0))
                if "scale" in layer:
                    scale, shift = (tensor(layer[key][t]).reshape(-1, *[1] * (x.ndim - 2)) for key in ("scale", "shift"))
                    x = x * scale + shift
                x = ACTIVATIONS[layer.get("activation", "identity")](x)
        outputs.append(x.flatten(1))
    return torch.stack(outputs)


class Maker:
    """Draws a case layer by layer."""

    def __init__(self, rows, image, points, dtype, terms=2, first="identity", pad=0, seed=0):
        self.rng, self.dtype, self.points = np.random.default_rng(seed), DTYPES[dtype], points
        self.channels = image[0]
        self.case = dict(
            terms=[self.strided(rows, *image, pad=pad) for _ in range(terms)],
            coefficients=self.mix(terms),
            layers=[],
            activation=first,
        )

    def draw(self, *shape, scale=1.0):
        return (self.rng.standard_normal(shape) * scale).astype(self.dtype)

    def strided(self, rows, *rest, pad=0, scale=1.0):
        """Rows with a gap of `pad` elements behind each, starting beside an aligned address."""
        n = int(np.prod(rest))
        store = np.full((rows, n + pad), np.nan, self.dtype)
        store[:, pad and 1 : n + (pad and 1)] = self.draw(rows, n, scale=scale)
        size = store.itemsize
        strides = [int(np.prod(rest[i + 1 :])) * size for i in range(len(rest))]
        return np.lib.stride_tricks.as_strided(store[:, pad and 1 :], (rows, *rest), ((n + pad) * size, *strides))

    def mix(self, k):
        c = self.rng.standard_normal((self.points, k))
        c[:1] = np.eye(1, k)
        return c

    def conv(
        self, out, kernel=(3, 3), stride=(1, 1), padding=(0, 0), activation="relu", blocks=2, bias=True, pad=0, norm=False
    ):
        scale = (self.channels * kernel[0] * kernel[1]) ** -0.5
        layer = dict(
            op="conv2d",
            weights=[self.strided(out, self.channels, *kernel, pad=pad, scale=scale) for _ in range(blocks)],
            biases=[self.draw(out) for _ in range(blocks)] if bias else None,
            coefficients=self.mix(blocks),
            stride=stride,
            padding=padding,
            activation=activation,
            slope=0.125,
        )
        if norm:
            layer.update(scale=self.rng.standard_normal((self.points, out)), shift=self.rng.standard_normal((self.points, out)))
        return self.add(out, layer)

    def pool(self, op, kernel, **options):
        return self.add(self.channels, dict(op=f"{op}_pool2d", kernel=kernel, **options))

    def flatten(self, size):
        return self.add(size, dict(op="flatten"))

    def linear(self, out, activation="identity", blocks=2):
        return self.add(
            out,
            dict(
                weights=[self.draw(out, self.channels, scale=self.channels**-0.5) for _ in range(blocks)],
                biases=[self.draw(out) for _ in range(blocks)],
                coefficients=self.mix(blocks),
                activation=activation,
            ),
        )

    def add(self, channels, layer):
        self.channels = channels
        self.case["layers"].append(layer)
        return self


def outputs(case, isa, threads=1, pad=3):
    """Into memory full of NaN; what lies between the rows must stay."""
    want = reference(case, torch.float64)
    points, rows, width = want.shape
    store = np.full((points, rows, width + pad), np.nan, case["terms"][0].dtype)
    engine.chain_outputs(
        case["terms"],
        case["coefficients"],
        case["layers"],
        store[:, :, :width],
        activation=case["activation"],
        slope=0.125,
        threads=threads,
        isa=isa,
    )
    assert np.isnan(store[:, :, width:]).all()
    return store[:, :, :width], want


def check(maker, isa, dtype, **options):
    got, want = outputs(maker.case, isa, **options)
    assert_close(got, reference(maker.case, PLAIN[dtype]), want)


def vgg(rows, image, points, dtype, **options):
    """conv-relu-pool-conv-relu-flatten-linear."""
    _, h, w = image
    return (
        Maker(rows, image, points, dtype, **options)
        .conv(7, padding=(1, 1))
        .pool("max", (2, 2))
        .conv(17, padding=(1, 1))
        .flatten(17 * (h // 2) * (w // 2))
        .linear(5)
    )


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
    check(Maker(9, (3, 8, 9), 1, dtype).conv(4, kernel, stride, padding).pool("max", (2, 1)), isa, dtype)


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
    check(Maker(3, (3, 5, 7), 2, dtype).conv(5, padding=(1, 1)).pool(op, kernel, **options), isa, dtype)
    check(Maker(3, (3, 10, 14), 2, dtype).pool("avg", (2, 2)).pool(op, kernel, **options), isa, dtype)


@every
@pytest.mark.parametrize("rows", [0, 1, 2, 33, 100])
@pytest.mark.parametrize("points", [1, 3])
def test_a_whole_chain(isa, dtype, rows, points):
    check(vgg(rows, (3, 9, 6), points, dtype, terms=3, first="relu", pad=5), isa, dtype, threads=2)


@every
def test_larger_images(isa, dtype):
    check(vgg(5, (3, 32, 32), 2, dtype), isa, dtype)
    check(
        Maker(3, (16, 32, 32), 2, dtype, first="relu").pool("max", (2, 2)).conv(32, padding=(1, 1)).pool("max", (2, 2)),
        isa,
        dtype,
    )
    check(
        Maker(2, (65, 40, 40), 1, dtype).conv(3, padding=(1, 1)).pool("avg", (40, 40)).flatten(3).linear(7), isa, dtype
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


# Channels, units, image and padding of 3 × 3 convolutions, odd ones included, that the engine computes by Winograd.
SQUARES = [
    (16, 16, (16, 16), 1), (31, 25, (7, 8), 1), (64, 64, (7, 7), 1), (40, 46, (6, 7), 1), (64, 64, (4, 4), 1),
    (20, 20, (8, 8), 1), (24, 20, (10, 6), 0), (48, 31, (9, 9), 0), (16, 24, (6, 6), 0), (32, 13, (40, 8), 1),
]  # fmt: skip
DIRECT = [(3, 64, (32, 32), 1), (16, 16, (7, 7), 1), (64, 64, (2, 2), 1), (64, 64, (5, 5), 1), (7, 25, (16, 16), 1)]


def convolution(channels, out, image, padding, dtype="float32", points=2, rows=33, **options):
    return Maker(rows, (channels, *image), points, dtype).conv(out, padding=(padding, padding), **options)


@every
@pytest.mark.parametrize("shape", SQUARES, ids=str)
def test_winograd(isa, dtype, shape):
    """Alone, with a norm, before poolings that take its rows in pairs or not, and with an activation of its own pass."""
    check(convolution(*shape, dtype), isa, dtype, threads=2)
    check(convolution(*shape, dtype, rows=3, norm=True, pad=1, blocks=3).pool("max", (2, 2)), isa, dtype)
    check(convolution(*shape, dtype, rows=3, bias=False).pool("avg", (2, 1), stride=(3, 2)), isa, dtype)
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
        plain[kind] = act(first + reference(dict(maker.case, layers=[layers[0], dict(layers[1], activation="identity")]), kind))
    assert_close(got, plain[PLAIN[dtype]], plain[torch.float64])


def leaks(shape, isa):
    """Whether a large pixel whose weights are zeros changes an output's last digits: in Winograd's sums it does."""
    maker = convolution(*shape, points=1, rows=1, activation="identity", blocks=1)
    maker.case["layers"][0]["weights"][0][:, :, (1, 2)] = maker.case["layers"][0]["weights"][0][:, :, :, (1, 2)] = 0
    _, out, (h, w), padding = shape
    pixels = []
    for _ in range(2):
        pixels.append(outputs(maker.case, isa)[0].reshape(out, h + 2 * padding - 2, w + 2 * padding - 2)[:, 1, 1].tobytes())
        maker.case["terms"][0][0, :, 2 - padding, 2 - padding] = 1e6
    return pixels[0] != pixels[1]


@pytest.mark.parametrize("isa", ISAS)
def test_where_winograd_is_taken(isa):
    assert [leaks(shape, isa) for shape in SQUARES] == [True] * len(SQUARES)
    assert [leaks(shape, isa) for shape in DIRECT] == [False] * len(DIRECT)


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
    alone = Maker(33, (2, 5, 5), 1, "float32", first="relu").pool("max", (3, 3), stride=(2, 2), padding=(1, 1))
    alone.case["terms"][0][7, 0, :3, :3] = value
    got, want = outputs(alone.case, isa)
    np.testing.assert_array_equal(got, want.numpy())


@every
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_in_their_place_by_winograd(isa, dtype, value):
    """In an input, then in a weight, too: an infinity would be NaN in a square. (Padding by zeros would make NaN of it.)"""
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
    maker.case["terms"][:] = [np.where(v > 0, top, -top).astype(DTYPES[dtype]) for v in maker.case["terms"]]
    maker.case["layers"][0]["weights"][0][:] *= DTYPES[dtype](1e-2)
    check(maker, isa, dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_and_threads(isa):
    case = vgg(777, (3, 6, 6), 5, "float32").case
    labels = np.arange(777) % 5
    sums = lambda threads: engine.chain_sums(
        case["terms"], case["coefficients"], case["layers"], labels, top5=True, isa=isa, threads=threads
    )
    one, exact = sums(1), reference(case, torch.float64)
    loss = torch.stack([F.cross_entropy(z, torch.from_numpy(labels), reduction="sum") for z in exact])
    np.testing.assert_allclose(one[:, 0], loss, rtol=1e-5)
    np.testing.assert_allclose(one[:, 1], (exact.argmax(2) != torch.from_numpy(labels)).sum(1), atol=1)
    for threads in (2, 5):
        assert sums(threads).tobytes() == one.tobytes()


def test_no_points_and_images_without_steps():
    case = vgg(3, (3, 4, 4), 0, "float32").case
    assert engine.chain_sums(case["terms"], case["coefficients"], case["layers"], np.zeros(3, np.int64)).shape == (0, 3)
    check(Maker(9, (3, 4, 5), 2, "float32").flatten(60).linear(4), "", "float32")
    check(Maker(9, (3, 4, 5), 2, "float32"), "", "float32")


def layers(*which):
    maker = Maker(2, (3, 4, 5), 1, "float32").conv(6).pool("max", (2, 2)).flatten(6).linear(4)
    return [maker.case["layers"][i] if isinstance(i, int) else dict(maker.case["layers"][i[0]], **i[1]) for i in which]


BAD = {
    "op": (layers((0, dict(op="conv3d"))), r"layers\[0\].op must be linear, conv2d, .* got 'conv3d'"),
    "no flatten": (layers(0, 1, 3), r"layers\[2\]: linear must come after flatten, got images of \[6, 1, 1\]"),
    "conv on rows": (layers(0, 1, 2, 0), r"layers\[3\]: conv2d must get images"),
    "channels": (layers(0, 0), r"layers\[1\].weights\[0\] must be \[any, 6, any, any\] float32, got \[6, 3, 3, 3\]"),
    "dilation": (layers((1, dict(dilation=(1, 1)))), r"\(max_pool2d\) has an unknown key 'dilation'"),
    "unknown key": (layers(0, (1, dict(activation="relu"))), r"\(max_pool2d\) has an unknown key 'activation'"),
    "stride": (layers((0, dict(stride=(0, 1)))), r"stride must be two integers of at least 1, got \(0, 1\)"),
    "padding": (layers((0, dict(padding=(1, -1)))), r"padding must be two integers of at least 0, got \(1, -1\)"),
    "kernel": (layers((1, dict(kernel=(2,)))), r"kernel must be two integers of at least 1, got \(2,\)"),
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
    "empty kernel": (layers((0, dict(weights=[np.zeros((6, 3, 0, 3), np.float32)] * 2))), "at least one tap"),
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
