"""The CUDA sources: what the emulation notices, the sanitizer, and the code that nvcc makes."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import cuda_cases
from compiled import CACHE
from cuda_cases import CSRC, CXX, agrees, compile_source, link_and_load, problem
from modeconn.backends import cuda

# Fixtures.
objects = cuda_cases.objects

NVCC = shutil.which("nvcc")

pytestmark = [
    pytest.mark.skipif(CXX is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="not in a checkout"),
    pytest.mark.usefixtures("poisoned_memory"),
]


# What the emulation notices.

MUTATIONS = [
    ("stream.h", "device::wait_copies<Stages - 2>();", "", "mma"),
    ("stream.h", "device::wait_copies<Stages - 2>();", "device::wait_copies<Stages - 1>();", "mma"),
    ("stream.h", "device::sync_block();", "", "mma"),
    ("stream.h", "device::fence_copies();", "", "wgmma"),
    ("mlp.h", "Product::sync();  // no thread", "// no thread", "mma"),
    ("mlp.h", "  device::sync_block();\n  Sums", "  Sums", "mma"),
    ("product_wgmma.h", "device::wgmma_wait();", "", "wgmma"),
    ("product_mma.h", "pair_column(thread, step % 4)", "pair_column(thread, 0)", "mma"),
]


# One kernel of the four that mlp_tf32.cu has: the compiler takes its time for each.
ONE_KERNEL = """
#include "instantiate.h"
namespace modeconn::cuda {
using Product = PRODUCT<Precision::tf32, 128>;
template <> int shared_bytes_of<Precision::tf32>(Variant, int) { return shared_bytes<Product>(); }
template <> void launch_mlp<Precision::tf32>(Variant, int, const MlpParams& p, void* stream) {
  const int64_t blocks = p.points * p.tiles;
  runtime::launch(mlp_kernel<Product>, "one", blocks, threads, shared_bytes<Product>(), stream, p);
}
}
"""
PRODUCTS = {"mma": "MmaProduct", "wgmma": "WgmmaProduct"}


def one_kernel(folder: Path, others: list[Path], variant: str) -> Any:
    """The module with a single kernel in tf32, from the headers of a folder."""
    source = folder / "one.cu"
    source.write_text(ONE_KERNEL.replace("PRODUCT", PRODUCTS[variant]), encoding="utf-8")
    return link_and_load([*others, compile_source(source)], folder.parent / "_cuda.so")


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, before, after, variant",
    [("mlp.h", None, None, "mma"), ("mlp.h", None, None, "wgmma"), *MUTATIONS],
    ids=lambda v: v[:24] if isinstance(v, str) else None,
)
def test_the_emulation_notices(objects, tmp_path, monkeypatch, file, before, after, variant):
    broken = shutil.copytree(CSRC, tmp_path / "cuda")
    shutil.copy(CSRC.parent / "activations.h", tmp_path)
    if before is not None:
        text = (broken / file).read_text(encoding="utf-8")
        assert text.count(before) == 1
        (broken / file).write_text(text.replace(before, after), encoding="utf-8")
    others = [path for name, path in objects.items() if name != "mlp_tf32.cu"]
    module = one_kernel(broken, others, variant)
    monkeypatch.setattr(cuda, "extension", lambda: module)
    # two blocks: the emulation runs their warps in either order
    p = problem(40, 2, 1, (95, 95, 95, 95))
    if before is None:  # nothing is broken
        agrees(p, "tf32", variant)
        return
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


def compiled_by_nvcc(name: str) -> tuple[Path, str]:
    """The object file of a source, and what ptxas says of it; kept until either changes."""
    command = [NVCC, "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v"]
    about = subprocess.run([NVCC, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(about + repr((command, name)).encode())
    for file in sorted(path for path in CSRC.parent.rglob("*") if path.is_file()):
        key.update(hashlib.sha256(file.read_bytes()).digest())
    made = CACHE / f"{key.hexdigest()}.nvcc.o"
    said = made.with_suffix(".log")
    if not (made.exists() and said.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [str(part) for part in (*command, "-c", CSRC / name, "-o", partial)],
            capture_output=True,
            text=True,
            check=True,
        )
        said.write_text(done.stderr, encoding="utf-8")
        partial.replace(made)  # last: what is there has its words beside it
    return made, said.read_text(encoding="utf-8")


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
def test_no_kernel_spills_and_all_use_the_tensor_cores(name, products):
    target, said = compiled_by_nvcc(f"mlp_{name}.cu")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(spills) == 2 * len(products) and set(spills) == {("0", "0")}, said
    assert "serialized" not in said, "ptxas waits for every wgmma"
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
