"""The engine's chains of layers against PyTorch, by the tolerance of policy.py."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from native_cases import engine, python
from policy import assert_within_policy

ISAS = engine.isas()
DTYPES = {"float32": np.float32, "float64": np.float64}
PLAIN = {"float32": torch.float32, "float64": torch.float64}
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.125),
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "elu": lambda x: F.elu(x, 0.125),
    "selu": F.selu,
    "softplus": F.softplus,
    "mish": F.mish,
}


def combine(blocks, coefficients):
    """sum_j c_j V_j as PyTorch computes it, zero coefficients skipped."""
    terms = [(c, b) for c, b in zip(coefficients, blocks) if c != 0]
    total = terms[0][1] * terms[0][0]
    for c, b in terms[1:]:
        total = total + b * c
    return total


def reference(case, dtype):
    """The chain's outputs [T, N, C] by plain PyTorch at this precision."""
    tensor = lambda a: torch.from_numpy(np.array(a)).to(dtype)
    outputs = []
    for t in range(len(case["coefficients"])):
        x = ACTIVATIONS[case["activation"]](
            combine([tensor(v) for v in case["terms"]], case["coefficients"][t].tolist())
        )
        for layer in case["layers"]:
            c = layer["coefficients"][t].tolist()
            w = combine([tensor(v) for v in layer["weights"]], c)
            cb = layer.get("bias_coefficients", layer["coefficients"])[t].tolist()
            b = combine([tensor(v) for v in layer["biases"]], cb) if layer.get("biases") else None
            x = ACTIVATIONS[layer["activation"]](F.linear(x, w, b))
        outputs.append(x)
    return torch.stack(outputs)


def unaligned(a, pad):
    """Copy into rows of stride columns + pad, one element past an aligned address."""
    if not pad:
        return np.ascontiguousarray(a)
    store = np.full((a.shape[0], a.shape[1] + pad), np.nan, a.dtype)
    store[:, 1 : a.shape[1] + 1] = a
    return store[:, 1 : a.shape[1] + 1]


def make(
    rows,
    widths,
    points,
    dtype,
    activation="relu",
    first="identity",
    terms=2,
    blocks=2,
    bias=True,
    pad=0,
    seed=0,
):
    rng = np.random.default_rng(seed)
    draw = lambda *s: rng.standard_normal(s).astype(dtype)
    matrix = lambda n, m, scale: unaligned(draw(n, m) * dtype(scale), pad)

    def coefficients(k):
        c = rng.standard_normal((points, k))
        c[:1] = np.eye(1, k)  # an end point: taken as it is
        return c

    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
        layers.append(
            dict(
                weights=[matrix(n_out, n_in, n_in**-0.5) for _ in range(blocks)],
                biases=[draw(n_out) for _ in range(blocks)] if bias else None,
                coefficients=coefficients(blocks),
                activation=activation if i + 2 < len(widths) else "identity",
                slope=0.125,
            )
        )
    return dict(
        terms=[matrix(rows, widths[0], 1) for _ in range(terms)],
        coefficients=coefficients(terms),
        layers=layers,
        activation=first,
    )


def outputs(case, isa, threads=1, pad=0, width=None):
    """Write into memory full of NaN, whose padding must stay; `width`: of layerless outputs."""
    points, rows = len(case["coefficients"]), len(case["terms"][0])
    if width is None:
        width = (
            len(case["layers"][-1]["weights"][0]) if case["layers"] else case["terms"][0].shape[1]
        )
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
    if pad:
        assert np.isnan(store[:, :, width:]).all()
    return store[:, :, :width]


def sums(case, targets, isa, threads=1, **options):
    return engine.chain_sums(
        case["terms"],
        case["coefficients"],
        case["layers"],
        targets,
        activation=case["activation"],
        slope=0.125,
        threads=threads,
        isa=isa,
        **options,
    )


def check_outputs(case, isa, dtype, **options):
    plain, exact = (reference(case, precision) for precision in (PLAIN[dtype], torch.float64))
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
    check_outputs(make(rows, widths, points, DTYPES[dtype]), isa, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 7, 63, 245, 1025])
@pytest.mark.parametrize("rows", [0, 1, 2, 63, 1025])
def test_odd_shapes_strided_and_unaligned(isa, dtype, width, rows):
    check_outputs(
        make(rows, (width, 5, width), 2, DTYPES[dtype], pad=3), isa, dtype, threads=2, pad=2
    )


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
@pytest.mark.parametrize("layers,classes", [(0, 10), (0, 1), (2, 10), (1, 1025), (0, 7)])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_sums(isa, dtype, layers, classes, loss):
    rows, points = 777, 5
    case = make(rows, [classes] * (layers + 1), points, DTYPES[dtype], terms=3, pad=1)
    rng = np.random.default_rng(1)
    plain, exact = (reference(case, precision) for precision in (PLAIN[dtype], torch.float64))
    if loss == "mse":
        targets = rng.standard_normal((rows, classes)).astype(DTYPES[dtype])
        got = sums(case, targets, isa, loss="mse")
        per_row = lambda y: ((y - torch.from_numpy(targets).to(y.dtype)) ** 2).mean(2)
    else:
        targets = rng.integers(0, classes, rows)
        got = sums(case, targets, isa, top5=True)
        labels = torch.from_numpy(targets)
        per_row = lambda y: torch.stack([F.cross_entropy(z, labels, reduction="none") for z in y])
        assert_same_counts(got, exact, labels)
    plain_sums, exact_sums = (per_row(y).double().sum(1) for y in (plain, exact))
    assert_within_policy("sums", got[:, 0], plain_sums, exact_sums, PLAIN[dtype])


def assert_same_counts(got, exact, labels):
    errors = (exact.argmax(2) != labels).sum(1).numpy()
    label_logit = exact.gather(2, labels[None, :, None].expand(len(exact), -1, 1))
    errors5 = ((exact > label_logit).sum(2) >= 5).sum(1).numpy()
    np.testing.assert_allclose(got[:, 1], errors, atol=1)  # a rounded tie may fall either way
    np.testing.assert_allclose(got[:, 2], errors5, atol=1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_losses_keep_their_digits(isa, dtype):
    logits = np.zeros((50, 3), DTYPES[dtype])
    logits[:, 1] = np.linspace(5, 80, 50)
    got = engine.chain_sums(
        [logits[i : i + 1] for i in range(50)], np.eye(50), [], np.array([1]), isa=isa
    )[:, 0]
    exact = F.cross_entropy(
        torch.from_numpy(logits).double(), torch.ones(50, dtype=torch.long), reduction="none"
    )
    exact = torch.log1p(2 * torch.exp(-torch.from_numpy(logits[:, 1]).double()))
    np.testing.assert_allclose(got, exact.numpy(), rtol=8 * np.finfo(DTYPES[dtype]).eps)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_non_finite_logits(isa, dtype):
    nan, inf = np.nan, np.inf
    logits = np.array(
        [
            [1, 1, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0],
            [nan, 1, nan, 0, 0, 0, 0],
            [1, inf, inf, 0, 0, 0, 0],
            [-inf, -inf, -inf, -inf, -inf, -inf, -inf],
            [0, -inf, 1, 2, 3, 4, 5],
            [0, 0, 0, 0, 0, 0, 0],
            [5, 4, 3, 2, 1, nan, inf],
        ],
        DTYPES[dtype],
    )
    for label in range(7):
        labels = torch.full((8,), label)
        plain = F.cross_entropy(torch.from_numpy(logits), labels, reduction="none").numpy()
        best = torch.from_numpy(logits).argmax(1).numpy()
        for row in range(8):
            got = engine.chain_sums(
                [logits[row : row + 1]], np.ones((1, 1)), [], np.array([label]), top5=True, isa=isa
            )[0]
            assert np.isnan(got[0]) == np.isnan(plain[row]) and np.isinf(got[0]) == np.isinf(
                plain[row]
            )
            assert got[1] == (best[row] != label)
            order = sorted(
                range(7),
                key=lambda c: (
                    -np.inf if np.isnan(logits[row, c]) else -logits[row, c],
                    not np.isnan(logits[row, c]),
                    c,
                ),
            )
            assert got[2] == (order.index(label) >= 5), (row, label)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_non_finite_weights_and_inputs_stay_in_their_place(isa, value):
    case = make(40, (9, 30, 4), 3, np.float32)
    # block 1 is not touched at point 2
    case["coefficients"][2], case["layers"][0]["coefficients"][2] = (1, 0), (1, 0)
    case["layers"][0]["weights"][1][17, 3] = value
    case["terms"][1][5] = value
    got = outputs(case, isa)
    want = reference(case, torch.float32).numpy()
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    assert np.isfinite(got[2]).all()
    loss = sums(case, np.zeros(40, np.int64), isa)[:, 0]
    assert not np.isfinite(loss[1]) and np.isfinite(loss[2])


@pytest.mark.parametrize("isa", ISAS)
def test_end_points_keep_every_bit(isa):
    special = np.array([[-0.0, 1e-45, -1e-39, 3.0]], np.float32)
    other = np.full_like(special, 7)
    out = np.full((2, 1, 4), np.nan, np.float32)
    engine.chain_outputs([special, other], np.array([[1.0, 0.0], [0.0, 1.0]]), [], out, isa=isa)
    assert out[0].tobytes() == special.tobytes() and out[1].tobytes() == other.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layers", [0, 2])
def test_sums_do_not_depend_on_threads(isa, layers):
    case = make(3001, [11] * (layers + 1), 7, np.float32)
    labels = np.arange(3001) % 11
    one = sums(case, labels, isa, threads=1)
    for threads in (2, 5):
        assert sums(case, labels, isa, threads=threads).tobytes() == one.tobytes()


def test_no_rows_and_no_points():
    case = make(0, (4, 3), 2, np.float32)
    assert (sums(case, np.zeros(0, np.int64), "") == 0).all()
    case = make(3, (4, 3), 0, np.float32)
    assert sums(case, np.zeros(3, np.int64), "").shape == (0, 3)


def broken(**changes):
    case = dict(make(6, (4, 3), 2, np.float32), targets=np.zeros(6, np.int64), options={})
    layer = dict(case["layers"][0], **changes.pop("layer", {}))
    case.update(layers=[layer], **changes)
    return case


BAD = {
    "label": (dict(targets=np.array([0, 1, 2, 3, 0, 0])), r"\[0, 3\), got 3 at row 3"),
    "negative label": (dict(targets=np.array([0, -1, 2, 0, 0, 0])), "got -1 at row 1"),
    "label type": (
        dict(targets=np.zeros(6, np.int32)),
        r"targets must be \[6\] int64, got \[6\] int32",
    ),
    "label count": (dict(targets=np.zeros(5, np.int64)), r"targets must be \[6\] int64, got \[5\]"),
    "terms": (dict(terms=[]), "terms must not be empty"),
    "term type": (dict(terms=[np.zeros((6, 4), np.float16)]), "float32 or float64, got .* float16"),
    "term shapes": (
        dict(terms=[np.zeros((6, 4), np.float32), np.zeros((5, 4), np.float32)]),
        r"terms\[1\] must be \[6, 4\] float32",
    ),
    "column stride": (
        dict(terms=[np.zeros((6, 8), np.float32)[:, ::2]] * 2),
        "contiguous in its last dimension",
    ),
    "coefficients": (
        dict(coefficients=np.zeros((2, 3))),
        r"coefficients must be \[any, 2\] float64, got \[2, 3\]",
    ),
    "weights": (
        dict(layer=dict(weights=[np.zeros((3, 5), np.float32)] * 2)),
        r"layers\[0\].weights\[0\] must be \[any, 4\]",
    ),
    "no weights": (dict(layer=dict(weights=[])), "must not be empty"),
    "no units": (dict(layer=dict(weights=[np.zeros((0, 4), np.float32)] * 2)), "at least one unit"),
    "biases": (
        dict(layer=dict(biases=[np.zeros(3, np.float32)])),
        "as many biases as weights or none, got 1 and 2",
    ),
    "bias coefficients": (
        dict(layer=dict(bias_coefficients=np.zeros((2, 3)))),
        r"bias_coefficients must be \[2, 2\] float64, got \[2, 3\]",
    ),
    "layer points": (
        dict(layer=dict(coefficients=np.zeros((3, 2)))),
        r"layers\[0\].coefficients must be \[2, 2\]",
    ),
    "activation": (dict(layer=dict(activation="swish")), "got 'swish'"),
    "unknown key": (dict(layer=dict(bias=None)), "unknown key 'bias'"),
    "threads": (dict(options=dict(threads=0)), "threads must be in 1..1024, got 0"),
    "isa": (dict(options=dict(isa="sse9")), "got 'sse9'"),
    "loss": (dict(options=dict(loss="hinge")), "got 'hinge'"),
    "top5": (
        dict(targets=np.zeros((6, 3), np.float32), options=dict(loss="mse", top5=True)),
        "top5 goes with",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    changes, message = BAD[name]
    case = broken(**changes)
    with pytest.raises(ValueError, match=message):
        engine.chain_sums(
            case["terms"], case["coefficients"], case["layers"], case["targets"], **case["options"]
        )


def test_outputs_must_be_writable_and_of_the_right_shape():
    case = make(6, (4, 3), 2, np.float32)
    out = np.zeros((2, 6, 3), np.float32)
    out.flags.writeable = False
    for bad, message in (
        (out, "writable"),
        (np.zeros((2, 6, 4), np.float32), r"must be \[2, 6, 3\]"),
        (np.zeros((2, 6, 3)), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.chain_outputs(case["terms"], case["coefficients"], case["layers"], bad)


def test_the_environment_forces_an_instruction_set():
    for isa in ISAS:
        assert python("print(e.kernel_names()[0])", MODECONN_ISA=isa).stdout.strip() == isa
    bad = python("e.kernel_names()", MODECONN_ISA="mmx")
    assert bad.returncode and "MODECONN_ISA must be one of" in bad.stderr and "'mmx'" in bad.stderr


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


def test_control_c_stops_within_a_second():
    code = """
import numpy as np, signal, threading, time, os
n = 512
f = lambda *s: np.zeros(s, np.float32)
layers = [dict(weights=[f(n, n)], coefficients=np.ones((500, 1))) for _ in range(10)]
def interrupt():
    global start
    start = time.process_time()
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    e.chain_sums([f(20000, n)], np.ones((500, 1)), layers, np.zeros(20000, np.int64), threads=2)
except KeyboardInterrupt:
    print("interrupted", time.process_time() - start)
"""
    done = python(code)
    # CPU seconds of two threads: other processes on the machine do not count.
    assert done.stdout.startswith("interrupted") and float(done.stdout.split()[1]) < 2, done
