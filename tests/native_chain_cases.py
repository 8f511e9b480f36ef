"""Chains of layers for the engine, and the same in plain PyTorch."""

import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from native_cases import engine

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
    "log_sigmoid": F.logsigmoid,
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


@functools.lru_cache(maxsize=1)
def known(dtype, rows, widths, points, **options):
    """A case, and its outputs in the case's precision and in float64: for all instruction sets."""
    case = make(rows, widths, points, DTYPES[dtype], **options)
    return case, reference(case, PLAIN[dtype]), reference(case, torch.float64)


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
