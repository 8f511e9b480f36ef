"""Runs the cases of one part of bench/gpu_check.py, in a process of their own.

    python bench/gpu_cases.py kernels '{"cases": [], "dry": true, "seconds": 30, "machine": []}'

Prints a line of JSON as a case begins and when it is done; without cases, as here, it lists them.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_timing import milliseconds

# The module of each part, which has a function cases(context).
MODULES = {"machine": __name__, "kernels": "gpu_kernels", "evaluations": "gpu_evaluations"}
Case = Callable[[], dict[str, Any]]


@dataclass
class Context:
    """The circumstances under which cases run.

    Attributes:
        device: where they run.
        dry: whether sizes are to be tiny.
        seconds: the time for all of them.
        machine: bytes per second of "copy", operations per second of each precision, where they
            were measured.
    """

    device: torch.device
    dry: bool
    seconds: float
    machine: dict[str, float] = field(default_factory=dict)

    def floor(self, bytes_: float, flops: float, precision: str) -> float | None:
        """Returns the least time for so many bytes and operations at the measured rates, in ms.

        For "float32" the better of true products and of three TF32 ones counts.
        """
        rates = self.machine
        if "copy" not in rates or precision not in rates:
            return None
        fastest = rates[precision]
        if precision == "float32":
            fastest = max(fastest, rates["tf32"] / 3)
        return 1e3 * max(bytes_ / rates["copy"], flops / fastest)


def cases(context: Context) -> dict[str, Case]:
    """Cases of the machine itself: its name, its rate of copies and of products per precision."""
    device = context.device

    def describe() -> dict[str, Any]:
        if device.type != "cuda":
            return {"note": f"no CUDA device, torch {torch.__version__}"}
        found = torch.cuda.get_device_properties(device)
        triton = "none"
        if importlib.util.find_spec("triton"):
            triton = importlib.import_module("triton").__version__
        size = f"{found.total_memory >> 30} GiB, {found.multi_processor_count} multiprocessors"
        versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton}"
        return {"note": f"{found.name}, {size}, {versions}"}

    def copy() -> dict[str, Any]:
        source = torch.randn((1 << 16) if context.dry else (1 << 28), device=device)
        target = torch.empty_like(source)
        ms = milliseconds(lambda: target.copy_(source), device)
        rate = 2 * source.numel() * source.element_size() / ms * 1e3
        return {"ms": ms, "value": rate, "note": f"{rate / 1e9:.0f} GB/s, read and written"}

    def product(precision: str) -> Case:
        def run() -> dict[str, Any]:
            from modeconn.backends.precision import products

            size = 64 if context.dry else 8192
            a, b = (torch.randn(size, size, device=device) for _ in range(2))
            if precision == "bf16":
                a, b = a.bfloat16(), b.bfloat16()
            with products(precision, device):
                ms = milliseconds(lambda: a @ b, device)
            rate = 2 * size**3 / ms * 1e3
            note = f"{rate / 1e12:.4g} TFLOP/s, {size}³ by PyTorch"
            return {"ms": ms, "value": rate, "note": note}

        return run

    products_of = {precision: product(precision) for precision in ("float32", "tf32", "bf16")}
    return {"device": describe, "copy": copy, **products_of}


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    part, order = sys.argv[1], json.loads(sys.argv[2])
    if not order["dry"] and not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    torch.manual_seed(0)
    machine = {r["case"]: r["value"] for r in order["machine"]}
    context = Context(
        torch.device("cpu" if order["dry"] else "cuda"), order["dry"], order["seconds"], machine
    )
    found = importlib.import_module(MODULES[part]).cases(context)
    if not order["cases"]:
        for name in found:
            say(case=name, listed=True)
        return
    ends = time.monotonic() + order["seconds"]
    for name in order["cases"]:
        if time.monotonic() > ends:
            return
        say(case=name, at=time.time())
        try:
            say(case=name, done=True, **found[name]())
        except Exception as error:  # the others may run all the same
            say(case=name, done=True, error=f"{type(error).__name__}: {str(error).strip()[:400]}")
            if "CUDA error" in str(error):  # nothing runs after that in this process
                raise SystemExit(3) from None


if __name__ == "__main__":
    main()
