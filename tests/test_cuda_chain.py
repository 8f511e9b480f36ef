"""The fused CUDA chain, compiled for an emulated device, against float64; and nvcc's code.

Whether the emulation would notice a missing wait or barrier is tested too, by taking them out.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from compiled import object_of
from modeconn.backends import cuda
from modeconn.backends.activations import Activation
from modeconn.backends.cuda import CudaLayer, mlp_sums
from naive import clone, mlp, pass_per_point
from policy import assert_within_policy

CSRC = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
CXX = shutil.which("g++") or shutil.which("c++")
NVCC = shutil.which("nvcc")
SOURCES = ("launch.cu", "mlp_float32.cu", "mlp_tf32.cu", "mlp_bf16.cu")

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="not in a checkout"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def compile_source(source: Path, *flags: str, headers: Path = CSRC) -> Path:
    """Compile for the emulated device; `headers`: the folder that a changed copy lies in."""
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
    return object_of(source, headers, command)


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


@pytest.fixture(scope="session")
def emulated(objects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("emulated")
    return link_and_load(list(objects.values()), folder / "_cuda.so")


@pytest.fixture
def device(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "extension", lambda: emulated)


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


KINDS = [("float32", "mma"), ("tf32", "mma"), ("tf32", "wgmma"), ("bf16", "mma"), ("bf16", "wgmma")]
SHAPES = [
    (1, 1, 1, (1, 2)),
    (63, 3, 2, (7, 63, 2, 1)),
    (130, 1, 3, (33, 128, 10)),
    (2, 2, 2, (245, 245, 7)),
    (3, 1, 1, (63, 129, 256)),
    (65, 9, 2, (12,)),
    (0, 2, 2, (5, 3)),
]


@pytest.mark.parametrize("precision, variant", KINDS)
@pytest.mark.parametrize("rows, points, count, widths", SHAPES, ids=str)
def test_shapes(device, rows, points, count, widths, precision, variant):
    agrees(problem(rows, points, count, widths), precision, variant)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("variant", ["mma", "wgmma"])
def test_activations(device, act, variant):
    agrees(problem(5, 2, 2, (9, 33, 6), act), "float32" if variant == "mma" else "tf32", variant)


def test_norms_are_folded_in_and_points_go_in_chunks(device, monkeypatch):
    p = problem(7, 5, 2, (9, 12, 6))
    g = torch.Generator().manual_seed(1)
    first = p["layers"][0]
    scale, shift = (torch.randn(5, 12, generator=g, dtype=torch.float64) for _ in range(2))
    fields = dict(first.__dict__)
    p["layers"][0] = CudaLayer(**{**fields, "scale": scale, "shift": shift})
    agrees(p)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "_WORKSPACE", 1)
        agrees(p)
    without = {
        **fields,
        "biases": torch.zeros(0, 12),
        "bias_coefficients": torch.zeros(5, 0, dtype=torch.float64),
    }
    p["layers"][0] = CudaLayer(**without)
    agrees(p)


def test_many_tiles_add_up_the_same_every_time(device):
    p = problem(128 * 33 + 1, 1, 2, (6,))
    agrees(p)
    first, second = (mlp_sums(**p) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("precision, variant", KINDS)
def test_what_is_not_finite_stays_so(device, precision, variant):
    p = problem(4, 3, 2, (5, 40, 7))
    # of a control point that the first point leaves out
    p["layers"][0].weights[1, 3, 2] = float("nan")
    got = mlp_sums(**p, precision=precision, variant=variant)
    assert got[0].isfinite().all() and got[1:, 0].isnan().all()
    p = problem(4, 2, 1, (5, 40, 7))
    p["layers"][1].biases[0, 2] = float("inf")
    got = mlp_sums(**p, precision=precision, variant=variant)
    # the second point's coefficient is negative
    assert got[0, 0].isnan() and not got[1, 0].isfinite()


def test_ties_and_special_logits(device):
    inf, nan = float("inf"), float("nan")
    x = torch.zeros(7, 7)
    x[1, :3] = torch.tensor([1, 2, 2])
    x[2, [1, 2, 5]] = torch.tensor([nan, 5, nan])
    x[3, 1], x[4, 0], x[5], x[6, 0] = -inf, 9e30, -inf, inf
    labels = torch.tensor([0, 2, 1, 1, 0, 0, 0])
    ones = torch.ones(1, 1, dtype=torch.float64)
    each = torch.stack(
        [mlp_sums([x[i : i + 1]], ones, [], labels[i : i + 1], top5=True)[0] for i in range(len(x))]
    )
    loss = nn.functional.cross_entropy(x, labels, reduction="none")
    torch.testing.assert_close(each[:, 0].float(), loss, equal_nan=True)
    assert torch.equal(each[:, 1], (x.argmax(1) != labels).double())
    assert each[:, 2].tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_bad_input_is_named(device):
    p = problem(4, 2, 2, (5, 3))
    for change, text in (
        ({"labels": p["labels"].int()}, "labels is torch.int32"),
        ({"coefficients": p["coefficients"].float()}, "coefficients is torch.float32"),
        ({"terms": [p["terms"][0], p["terms"][1][:, :4]]}, r"terms\[1\] is"),
        ({"terms": [t.T.contiguous().T for t in p["terms"]]}, r"terms\[0\] is .* contiguous"),
        ({"terms": []}, r"coefficients is .*\[2, 0\]"),
        ({"precision": "fp8"}, "precision must be one of float32, tf32, bf16, got 'fp8'"),
        ({"activation": "swish"}, "activation must be one of identity"),
        ({"variant": "wgmma"}, "variant 'wgmma' is for tf32 and bf16"),
    ):
        with pytest.raises(mc.ModeconnError, match=text):
            mlp_sums(**{**p, **change})
    with pytest.raises(mc.ModeconnError, match=r"width must be in 1..256, got 257"):
        mlp_sums(**problem(2, 1, 1, (257, 3)))
    with pytest.raises(mc.ModeconnError, match=r"layers\[0\].units must be in 1..256, got 300"):
        mlp_sums(**problem(2, 1, 1, (3, 300, 2)))


# The backend.

X = torch.randn(130, 20, generator=torch.Generator().manual_seed(0))
Y = torch.arange(130) % 10


def evaluates(model: nn.Module, path: object, points: int) -> None:
    names = ("loss", "error", "top5_error")
    got = mc.evaluate(model, path, (X, Y), points, backend="cuda", metrics=names)
    near, exact = (
        pass_per_point(model, path, X, Y, got.t, d) for d in (torch.float32, torch.float64)
    )
    assert got.backend == "cuda"
    for name in ("loss", "error"):
        assert_within_policy(name, got.values[name], near[name], exact[name], torch.float32)
    reference = mc.evaluate(model, path, (X, Y), points, backend="reference", metrics=names)
    np.testing.assert_array_equal(got.top5_error, reference.top5_error)


def test_backend_on_lines_with_dead_units_and_combined_logits(device):
    a, b = (mlp(20, 33, 17, 10, seed=k) for k in range(2))
    evaluates(a, mc.Line(a, b), 5)
    swing = clone(a)
    swing["4.weight"] += 0.1
    dead = clone(a)
    dead["2.weight"][:, 16:] = 0
    evaluates(a, mc.PolyChain([a, swing, dead]), 7)


@pytest.mark.filterwarnings("ignore:batch norms .* interpolated")
def test_backend_with_norms(device):
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(20, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 10))
        net(X)
        return net.eval()

    a, b = make(0), make(1)
    evaluates(a, mc.Line(a, b), 3)


def test_what_the_backend_cannot_run_is_said_in_one_line(device):
    a, b = (mlp(20, 300, 300, 10, seed=k) for k in range(2))
    with pytest.raises(mc.ModeconnError, match="its width is 300: expected at most 256"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend="cuda")
    a, b = (mlp(20, 9, 10, seed=k) for k in range(2))
    with pytest.raises(mc.ModeconnError, match="computes in float32"):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend="cuda", precision="float64")


def test_without_a_gpu_or_the_extension_the_reason_is_given(monkeypatch):
    a, b = (mlp(20, 9, 10, seed=k) for k in range(2))
    with pytest.raises(
        mc.ModeconnError, match=r'backend "cuda" cannot run this: .*(not available|CUDA device)'
    ):
        mc.evaluate(a, mc.Line(a, b), (X, Y), 3, backend="cuda", device="cpu")
    assert mc.evaluate(a, mc.Line(a, b), (X, Y), 3).backend != "cuda"


# What the emulation notices.

MUTATIONS = [
    ("stream.h", "device::wait_copies<Stages - 2>();", "", "mma"),
    ("stream.h", "device::wait_copies<Stages - 2>();", "device::wait_copies<Stages - 1>();", "mma"),
    ("stream.h", "device::sync_block();", "", "mma"),
    ("stream.h", "device::fence_copies();", "", "wgmma"),
    ("mlp.h", "Product::sync();  // nobody", "// nobody", "mma"),
    ("mlp.h", "  device::sync_block();\n  Sums", "  Sums", "mma"),
    ("product_wgmma.h", "device::wgmma_wait();", "", "wgmma"),
    ("product_mma.h", "pair_column(thread, step % 4)", "pair_column(thread, 0)", "mma"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, before, after, variant", MUTATIONS, ids=lambda v: v[:24] if isinstance(v, str) else None
)
def test_the_emulation_notices(objects, tmp_path, monkeypatch, file, before, after, variant):
    broken = shutil.copytree(CSRC, tmp_path / "cuda")
    text = (broken / file).read_text(encoding="utf-8")
    assert text.count(before) == 1
    (broken / file).write_text(text.replace(before, after), encoding="utf-8")
    others = [path for name, path in objects.items() if name != "mlp_tf32.cu"]
    changed = compile_source(broken / "mlp_tf32.cu", headers=broken)
    module = link_and_load([*others, changed], tmp_path / "_cuda.so")
    monkeypatch.setattr(cuda, "extension", lambda: module)
    # two blocks: the emulation runs their warps in either order
    p = problem(40, 2, 1, (95, 95, 95, 95))
    with pytest.raises((AssertionError, RuntimeError)):
        agrees(p, "tf32", variant)


@pytest.mark.slow
def test_the_sanitizer_finds_nothing(objects, tmp_path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    mine = [CSRC / "mlp_tf32.cu", CSRC / "launch.cu", CSRC / "tests" / "driver.cpp"]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda source: compile_source(source, *flags), mine))
    others = [objects[name] for name in ("mlp_float32.cu", "mlp_bf16.cu")]
    program = tmp_path / "driver"
    subprocess.run(
        [str(part) for part in (CXX, *flags[:1], *made, *others, "-o", program)], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and "PASS" in done.stdout, done.stdout + done.stderr


# What nvcc makes of it.


def disassembler() -> str | None:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("name, products", [("tf32", {"HMMA", "HGMMA"}), ("float32", {"HMMA"})])
def test_no_kernel_spills_and_all_use_the_tensor_cores(tmp_path, name, products):
    target = tmp_path / "kernels.o"
    command = [NVCC, "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    done = subprocess.run(
        [str(part) for part in (*command, "-c", CSRC / f"mlp_{name}.cu", "-o", target)],
        capture_output=True,
        text=True,
        check=True,
    )
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == 2 * len(products) and set(spills) == {("0", "0")}, done.stderr
    assert "serialized" not in done.stderr, "ptxas waits for every wgmma"
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump: the instructions are not read")
    sass = subprocess.run(
        [tool, "-sass", target], capture_output=True, text=True, check=True
    ).stdout
    for kernel in sass.split("Function : ")[1:]:
        wanted = "HGMMA" if "WgmmaProduct" in kernel.split("\n")[0] else "HMMA"
        assert re.search(rf"\b{wanted}\b", kernel) and wanted in products
        assert "LDGSTS" in kernel, "weights are not copied asynchronously"
        assert not re.search(r"\b(LDL|STL)\b", kernel), "registers are kept in memory"


@pytest.mark.skipif(
    importlib.util.find_spec("modeconn._cuda") is None, reason="modeconn._cuda is not built"
)
def test_the_extension_needs_no_cuda_library_and_exports_nothing():
    spec = importlib.util.find_spec("modeconn._cuda")
    assert spec is not None and spec.origin is not None
    if sys.platform != "linux" or not (shutil.which("ldd") and shutil.which("nm")):
        pytest.skip("no ldd or nm")
    needed = subprocess.run(["ldd", spec.origin], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in needed.replace(spec.origin, "")
    names = subprocess.run(
        ["nm", "-D", "--defined-only", spec.origin], capture_output=True, text=True, check=True
    ).stdout
    exported = [line.split()[-1] for line in names.splitlines()]
    assert [name for name in exported if "cuda" in name] == ["PyInit__cuda"]
