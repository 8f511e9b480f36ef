"""Graphs of engine steps that read and add earlier values, against PyTorch; losses of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from policy import assert_within_policy
from test_native_chain import ACTIVATIONS, DTYPES, ISAS, PLAIN, combine, engine

every = lambda f: pytest.mark.parametrize("isa", ISAS)(pytest.mark.parametrize("dtype", DTYPES)(f))


class Net:
    """Draws a graph step by step; `values`: the shapes of the terms and of each step's rows."""

    def __init__(self, rows, shape, points=3, dtype="float32", seed=0):
        self.rng, self.rows, self.points, self.dtype = (
            np.random.default_rng(seed),
            rows,
            points,
            DTYPES[dtype],
        )
        self.terms = [self.draw(rows, *shape) for _ in range(2)]
        self.coefficients, self.layers, self.values = self.mix(2), [], [shape]

    def draw(self, *shape, scale=1.0):
        return (self.rng.standard_normal(shape) * scale).astype(self.dtype)

    def mix(self, k):
        return self.rng.standard_normal((self.points, k))

    def push(self, shape, **layer):
        self.layers.append(layer)
        self.values.append(shape)
        return len(self.layers) - 1

    def product(
        self, out, read=None, add=None, activation="relu", kernel=(3, 3), norm=False, **window
    ):
        shape = self.values[-1 if read is None else read + 1]
        image, groups = len(shape) == 3, window.get("groups", 1)
        size = (out, shape[0] // groups, *kernel) if image else (out, shape[0])
        scale = float(np.prod(size[1:])) ** -0.5
        more = dict(input=read, add=add, activation=activation, slope=0.125, **window)
        if norm:
            more |= dict(scale=self.mix(out), shift=self.mix(out))
        after = (out,)
        if image:
            probe = torch.zeros(1, *shape)
            after = tuple(F.conv2d(probe, torch.zeros(size), **window).shape[1:])
        return self.push(
            after,
            op="conv2d" if image else "linear",
            weights=[self.draw(*size, scale=scale) for _ in range(2)],
            biases=[self.draw(out) for _ in range(2)],
            coefficients=self.mix(2),
            **more,
        )

    def pool(self, op, kernel, read=None, **options):
        c, h, w = self.values[-1 if read is None else read + 1]
        f = F.max_pool2d if op == "max" else F.avg_pool2d
        window = {"ceil_mode" if key == "ceil" else key: value for key, value in options.items()}
        after = tuple(f(torch.zeros(1, c, h, w), kernel, **window).shape[1:])
        return self.push(after, op=f"{op}_pool2d", kernel=kernel, input=read, **options)

    def flatten(self, read=None):
        shape = self.values[-1 if read is None else read + 1]
        return self.push((int(np.prod(shape)),), op="flatten", input=read)

    def add(self, *inputs, activation="identity"):
        return self.push(
            self.values[inputs[0] + 1],
            op="add",
            inputs=list(inputs),
            activation=activation,
            slope=0.125,
        )

    def multiply(self, first, second, activation="identity"):
        return self.push(
            self.values[first + 1],
            op="multiply",
            inputs=[first, second],
            activation=activation,
            slope=0.125,
        )

    def affine(self, read=None, add=None, activation="identity"):
        shape = self.values[-1 if read is None else read + 1]
        return self.push(
            shape,
            op="affine",
            input=read,
            add=add,
            scale=self.mix(shape[0]),
            shift=self.mix(shape[0]),
            activation=activation,
            slope=0.125,
        )

    def group_norm(self, groups, read=None, eps=1e-5, activation="identity"):
        shape = self.values[-1 if read is None else read + 1]
        return self.push(
            shape,
            op="group_norm",
            input=read,
            groups=groups,
            eps=eps,
            scale=self.mix(shape[0]),
            shift=self.mix(shape[0]),
            activation=activation,
            slope=0.125,
        )

    def take(self, channels, read=None, activation="identity"):
        shape = self.values[-1 if read is None else read + 1]
        return self.push(
            (len(channels), *shape[1:]),
            op="take",
            input=read,
            channels=channels,
            activation=activation,
            slope=0.125,
        )

    def concat(self, *inputs, activation="identity"):
        shapes = [self.values[i + 1] for i in inputs]
        return self.push(
            (sum(shape[0] for shape in shapes), *shapes[0][1:]),
            op="concat",
            inputs=list(inputs),
            activation=activation,
            slope=0.125,
        )

    def more_terms(self, *shape, activation="identity"):
        terms = [self.draw(self.rows, *shape) for _ in range(3)]
        return self.push(
            shape,
            op="terms",
            terms=terms,
            coefficients=self.mix(3),
            activation=activation,
            slope=0.125,
        )

    def reference(self, dtype):
        tensor = lambda a: torch.from_numpy(np.array(a)).to(dtype)
        mixed = lambda arrays, c, t: combine([tensor(a) for a in arrays], c[t].tolist())
        outputs = []
        for t in range(self.points):
            values = [mixed(self.terms, self.coefficients, t)]
            for layer in self.layers:
                at = lambda key, layer=layer, values=values: (
                    values[-1] if layer.get(key) is None else values[layer[key] + 1]
                )
                op = layer["op"]
                per_channel = lambda key, x, t=t, layer=layer: tensor(layer[key][t]).reshape(
                    -1, *[1] * (x.ndim - 2)
                )
                more = 0 if layer.get("add") is None else values[layer["add"] + 1]
                if op == "terms":
                    y = mixed(layer["terms"], layer["coefficients"], t)
                elif op == "add":
                    y = sum(values[i + 1] for i in layer["inputs"])
                elif op == "multiply":
                    y = values[layer["inputs"][0] + 1] * values[layer["inputs"][1] + 1]
                elif op == "affine":
                    y = (
                        at("input") * per_channel("scale", at("input"))
                        + per_channel("shift", at("input"))
                        + more
                    )
                elif op == "group_norm":
                    x = at("input")
                    y = F.group_norm(x, layer["groups"], None, None, layer["eps"]) if len(x) else x
                    y = y * per_channel("scale", y) + per_channel("shift", y)
                elif op == "take":
                    x = at("input")
                    y = torch.cat([x, torch.zeros_like(x[:, :1])], 1)[:, layer["channels"]]
                elif op == "concat":
                    y = torch.cat([values[i + 1] for i in layer["inputs"]], dim=1)
                elif op == "flatten":
                    y = at("input").flatten(1)
                elif op.endswith("pool2d"):
                    pool = F.max_pool2d if op.startswith("max") else F.avg_pool2d
                    window = {key: layer[key] for key in ("stride", "padding") if key in layer}
                    y = pool(
                        at("input"), layer["kernel"], ceil_mode=layer.get("ceil", False), **window
                    )
                else:
                    w, b = (
                        mixed(layer[key], layer["coefficients"], t) for key in ("weights", "biases")
                    )
                    window = {
                        key: layer[key]
                        for key in ("stride", "padding", "dilation", "groups")
                        if key in layer
                    }
                    y = (
                        F.linear(at("input"), w, b)
                        if op == "linear"
                        else F.conv2d(at("input"), w, b, **window)
                    )
                    if "scale" in layer:
                        y = y * per_channel("scale", y) + per_channel("shift", y)
                    y = y + more
                values.append(ACTIVATIONS[layer.get("activation", "identity")](y))
            outputs.append(values[-1].flatten(1))
        return torch.stack(outputs)

    def outputs(self, isa, threads=1):
        out = np.full((self.points, self.rows, int(np.prod(self.values[-1]))), np.nan, self.dtype)
        engine.chain_outputs(
            self.terms, self.coefficients, self.layers, out, threads=threads, isa=isa
        )
        return out

    def check(self, isa, dtype, threads=1):
        plain, exact = (self.reference(precision) for precision in (PLAIN[dtype], torch.float64))
        got = self.outputs(isa, threads)
        assert_within_policy("outputs", got, plain, exact, PLAIN[dtype])


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


def bad(*layers, shape=(3, 4, 5)):
    net = Net(2, shape, points=1)
    net.product(3, padding=(1, 1)) if len(shape) == 3 else net.product(3)
    return lambda: engine.chain_outputs(
        net.terms, net.coefficients, [*net.layers, *layers], np.zeros((1, 2, 3), np.float32)
    )


BAD = {
    "input": (
        bad(dict(op="flatten", input=1)),
        r"layers\[1\].input must be a step before it, or -1 for the terms, got 1",
    ),
    "add": (bad(dict(op="add", inputs=[-2])), "must be a step before it"),
    "no inputs": (bad(dict(op="add", inputs=[])), r"layers\[1\] \(add\) must have inputs"),
    "affine": (
        bad(dict(op="affine", scale=np.ones((1, 3)))),
        r"layers\[1\] \(affine\) must have scale and shift",
    ),
    "scale": (
        bad(dict(op="affine", scale=np.ones((1, 4)), shift=np.ones((1, 4)))),
        r"layers\[1\].scale must be \[1, 3\] float64",
    ),
    "one factor": (
        bad(dict(op="multiply", inputs=[0])),
        r"layers\[1\] \(multiply\) must have two inputs, got 1",
    ),
    "factors": (
        bad(dict(op="max_pool2d", kernel=(2, 2)), dict(op="multiply", inputs=[0, 1])),
        (
            r"of one shape, or the second one pixel, "
            r"got images of \[3, 4, 5\] and images of \[3, 2, 2\]"
        ),
    ),
    "no channels": (bad(dict(op="take", channels=[])), r"layers\[1\] \(take\) must have channels"),
    "channels": (
        bad(dict(op="take", channels=[0, 3])),
        r"layers\[1\].channels must be in \[0, 3\), or -1 for zeros, got 3",
    ),
    "group norm": (
        bad(dict(op="group_norm", scale=np.ones((1, 3)))),
        r"\(group_norm\) must have scale, shift and eps",
    ),
    "groups of a norm": (
        bad(dict(op="group_norm", scale=np.ones((1, 3)), shift=np.ones((1, 3)), eps=0.1, groups=2)),
        r"layers\[1\].groups must divide the 3 channels, got 2",
    ),
    "means rounded up": (
        bad(dict(op="avg_pool2d", kernel=(2, 2), ceil=True)),
        r"layers\[1\].ceil goes with max_pool2d only",
    ),
    "sizes": (
        bad(dict(op="max_pool2d", kernel=(2, 2)), dict(op="concat", inputs=[0, 1])),
        (
            r"layers\[2\].inputs must be rows, or images of one size, "
            r"got images of \[3, 4, 5\] and images of \[3, 2, 2\]"
        ),
    ),
    "shapes": (
        bad(dict(op="flatten"), dict(op="add", inputs=[1, 0])),
        "of one shape, got rows of 60 and images",
    ),
    "two flattens": (
        bad(dict(op="flatten", input=0), dict(op="flatten", input=-1)),
        "flatten must come once only",
    ),
    "flattened rows": (
        bad(dict(op="flatten"), shape=(4,)),
        "flatten must get images, got rows of 3",
    ),
    "behind flatten": (
        bad(dict(op="flatten"), dict(op="max_pool2d", kernel=(1, 1), input=0)),
        "must be behind",
    ),
    "terms": (
        bad(dict(op="terms", terms=[], coefficients=np.ones((1, 0)))),
        r"layers\[1\].terms must not be empty",
    ),
    "coefficients": (
        bad(dict(op="terms", terms=[np.zeros((2, 4), np.float32)], coefficients=np.ones((2, 1)))),
        r"layers\[1\].coefficients must be \[1, 1\] float64",
    ),
    "rows": (
        bad(dict(op="terms", terms=[np.zeros((3, 4), np.float32)], coefficients=np.ones((1, 1)))),
        r"layers\[1\].terms\[0\] must be \[2, any\] float32, got \[3, 4\]",
    ),
    "images later": (
        bad(
            dict(
                op="terms", terms=[np.zeros((2, 4, 1, 1), np.float32)], coefficients=np.ones((1, 1))
            ),
            shape=(4,),
        ),
        "must be rows where the first terms are, got images",
    ),
    "add to a product": (
        bad(
            dict(weights=[np.zeros((5, 3), np.float32)], coefficients=np.ones((1, 1)), add=-1),
            shape=(4,),
        ),
        r"layers\[1\].add must be rows of 5 like the step's value, got rows of 4",
    ),
    "groups": (
        bad(
            dict(
                op="conv2d",
                weights=[np.zeros((4, 3, 1, 1), np.float32)],
                coefficients=np.ones((1, 1)),
                groups=2,
            )
        ),
        r"groups must divide the 3 channels, got 2",
    ),
    "units": (
        bad(
            dict(
                op="conv2d",
                weights=[np.zeros((4, 1, 1, 1), np.float32)],
                coefficients=np.ones((1, 1)),
                groups=3,
            )
        ),
        r"groups must divide the 4 units, got 3",
    ),
    "dilation": (
        bad(
            dict(
                op="conv2d",
                weights=[np.zeros((4, 3, 3, 3), np.float32)],
                coefficients=np.ones((1, 1)),
                dilation=(2, 1),
            )
        ),
        r"got kernel 3x3 for 4x5 with padding 0x0 and dilation 2x1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_graphs_are_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
