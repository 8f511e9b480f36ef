"""The fused CUDA chain, compiled for an emulated device, and problems for it."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compiled import CXX, object_of
from modeconn.backends.activations import Activation
from modeconn.backends.cuda import CudaLayer, mlp_sums
from policy import assert_within_policy

CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
SOURCES = ("launch.cu", "mlp_float32.cu", "mlp_tf32.cu", "mlp_bf16.cu")


def compile_source(source: Path, *flags: str) -> Path:
    """Compile for the emulated device."""
    assert CXX is not None
    pybind11 = pytest.importorskip("pybind11")
    include = [
        f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_paths()["include"])
    ]
    general = [
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-gnu-unique",
        '-DMODECONN_CUDA_ARCHS="none"',
    ]
    level = "-O0" if source.name == "bindings.cpp" else "-O1"
    command = [
        CXX,
        *general,
        level,
        *include,
        "-Wno-unknown-pragmas",
        *flags,
        "-x",
        "c++",
    ]
    return object_of(source, command)


def link_and_load(objects: list[Path], target: Path) -> Any:
    subprocess.run([str(part) for part in (CXX, "-shared", *objects, "-o", target)], check=True)
    # A name of its own: pybind11 keeps the first module of a name.
    spec = importlib.util.spec_from_file_location(f"{target.parent.name}._cuda", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def objects() -> dict[str, Path]:
    names = ("bindings.cpp", *SOURCES)
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(lambda name: compile_source(CSRC / name), names)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "leaky_relu": lambda x: nn.functional.leaky_relu(x, 0.1),
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "sigmoid": torch.sigmoid,
}


def problem(
    rows: int, points: int, count: int, widths: tuple[int, ...], act: str = "relu", seed: int = 0
) -> dict[str, Any]:
    """Random arguments of mlp_sums, with coefficients of 0 and 1 among them."""
    g = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(points, count, generator=g, dtype=torch.float64)
    coefficients[0] = 0
    coefficients[0, 0] = 1
    layers = [
        CudaLayer(
            torch.randn(count, after, before, generator=g) / before**0.5,
            coefficients,
            torch.randn(count, after, generator=g),
            coefficients,
            activation=Activation(act if last else "identity", 0.1),
        )
        for before, after, last in zip(widths, widths[1:], range(len(widths) - 2, -1, -1))
    ]
    return {
        "terms": [torch.randn(rows, widths[0], generator=g) for _ in range(count)],
        "coefficients": coefficients,
        "layers": layers,
        "labels": torch.randint(widths[-1], (rows,), generator=g),
        "activation": Activation(act, 0.1),
        "top5": widths[-1] > 5,
    }


def rounded(x: Tensor, precision: str) -> Tensor:
    """Operands as the tensor cores get them."""
    if precision == "bf16":
        return x.bfloat16().float()
    return (
        ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) if precision == "tf32" else x
    )


def plain(p: dict[str, Any], dtype: torch.dtype, precision: str = "float32") -> np.ndarray:
    """The same by PyTorch, one point after the other."""

    def blend(tensors: Any, row: Tensor) -> Tensor:
        return sum(c * t.to(dtype) for c, t in zip(row.tolist(), tensors) if c) + torch.zeros(
            (), dtype=dtype
        )

    act, rows = ACTIVATIONS[p["activation"].name], []
    operand = lambda v: rounded(v, precision) if dtype == torch.float32 else v  # noqa: E731
    for t in range(len(p["coefficients"])):
        x = act(blend(p["terms"], p["coefficients"][t]))
        for layer in p["layers"]:
            w, b = (
                blend(layer.weights, layer.coefficients[t]),
                blend(layer.biases, layer.bias_coefficients[t]),
            )
            if layer.scale is not None:
                w, b = (
                    layer.scale[t, :, None].to(dtype) * w,
                    (layer.scale[t] * b + layer.shift[t]).to(dtype),
                )
            x = ACTIVATIONS[layer.activation.name](operand(x) @ operand(w).T + b)
        loss = nn.functional.cross_entropy(x, p["labels"], reduction="none")
        own = x.gather(1, p["labels"][:, None])  # of equal logits the first ranks above the others
        above = (x > own) | ((x == own) & (torch.arange(x.shape[1]) < p["labels"][:, None]))
        top5 = (above.sum(1) >= 5).sum() if p["top5"] else 0
        rows.append(
            [float(loss.double().sum()), float((x.argmax(1) != p["labels"]).sum()), float(top5)]
        )
    return np.array(rows).reshape(-1, 3)


def agrees(p: dict[str, Any], precision: str = "float32", variant: str = "mma") -> None:
    got = mlp_sums(**p, precision=precision, variant=variant).numpy()
    near, exact = plain(p, torch.float32, precision), plain(p, torch.float64)
    for i, name in enumerate(("loss", "errors", "top-5 errors")):
        assert_within_policy(name, got[:, i], near[:, i], exact[:, i], torch.float32)
