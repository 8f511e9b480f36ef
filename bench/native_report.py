"""The native engine, one line per case: GFLOP/s, share of the peaks, residual, verdict.

    python bench/native_report.py [--threads 1] [--isa avx512,avx2] [--repeats 5] [--only TEXT]
    [--json FILE]

The peaks are those of the same run, interleaved: "fma" is a loop of multiply-adds on registers with
the same vectors, "torch" the 2048³ float32 product. One thread is timed in processor time, more in
wall time; the best of the repeats counts. The residual is the largest error of a point's mean loss
against float64 on the first rows, and passes where it is at most twice plain PyTorch's, plus two
rounding errors.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run import machine
from torch import Tensor
from torch.nn import functional as F

from modeconn import _native as engine
from modeconn.files.writing import atomic_write

PEAK = Path(__file__).resolve().parent.parent / "csrc" / "tests" / "peak.cpp"
# The line's arithmetic per sample and point on the 784-245x10-10 network: what the last case is
# compared with.
MNIST_PASS = 1.41e6
# name: rows, points, widths behind the combined first layer; or channels of 3 × 3 convolutions on
# 16 × 16 images
CASES: dict[str, tuple[int, int, list[int]]] = {
    "line 245x9-10, 20000 rows, 5 points": (20000, 5, [245] * 10 + [10]),
    "line 245x9-10, 20000 rows, 1 point": (20000, 1, [245] * 10 + [10]),
    "line 245x9-10, 3000 rows, 21 points": (3000, 21, [245] * 10 + [10]),
    "line 245x9-10, 300 rows, 101 points": (300, 101, [245] * 10 + [10]),
    "line 245x1-10, 20000 rows, 3 points": (20000, 3, [245, 245, 10]),
    "line 64x9-10, 60000 rows, 3 points": (60000, 3, [64] * 10 + [10]),
    "line 512x9-10, 6000 rows, 3 points": (6000, 3, [512] * 10 + [10]),
    "line 2048x3-10, 2048 rows, 1 point": (2048, 1, [2048] * 4 + [10]),
    "convolutions 64-64-64, 256 images, 3 points": (256, 3, [64, 64, 64]),
    "residual convolutions 64-64-64, 256 images, 3 points": (256, 3, [64, 64, 64]),
    "grouped convolutions 64-64-64, 256 images, 3 points": (256, 3, [64, 64, 64]),
    "residual line 245x9-10, 20000 rows, 5 points": (20000, 5, [245] * 10 + [10]),
    "gelu line 245x9-10, 20000 rows, 5 points": (20000, 5, [245] * 10 + [10]),
    "logits 10, 60000 rows, 128 points": (60000, 128, [10]),
}
SIDE = 16  # of the images
GROUPS = 8  # of a grouped convolution's channels


@dataclass
class Case:
    """A chain of layers behind the ReLU of combined terms, and labels."""

    terms: list[np.ndarray]
    coefficients: np.ndarray
    layers: list[dict[str, Any]]
    labels: np.ndarray
    flops: float

    def sums(self, isa: str, threads: int = 1) -> np.ndarray:
        """Returns the engine's sums over the rows, [points, 3]."""
        return engine.chain_sums(
            self.terms,
            self.coefficients,
            self.layers,
            self.labels,
            activation="relu",
            threads=threads,
            isa=isa,
        )

    def first(self, rows: int, points: int) -> Case:
        """Returns the first rows and points of the case, for the residual."""
        c = np.ascontiguousarray(self.coefficients[:points])
        layers = [
            {**layer, "coefficients": c} if "coefficients" in layer else layer
            for layer in self.layers
        ]
        return Case([v[:rows] for v in self.terms], c, layers, self.labels[:rows], 0.0)

    def losses(self, dtype: torch.dtype) -> np.ndarray:
        """Computes mean losses [points] by plain PyTorch."""

        means = []
        for row in self.coefficients:
            x = _mix(self.terms, row, dtype).relu()
            for layer in self.layers:
                x = x.flatten(1) if layer["op"] == "flatten" else _apply(layer, x, row)
            losses = F.cross_entropy(x, torch.from_numpy(self.labels), reduction="none")
            means.append(losses.double().mean())
        return torch.stack(means).numpy()


def _mix(blocks: list[np.ndarray], row: np.ndarray, dtype: torch.dtype) -> Tensor:
    parts = [float(c) * torch.from_numpy(block).to(dtype) for c, block in zip(row, blocks)]
    return torch.stack(parts).sum(0)


def _apply(layer: dict[str, Any], x: Tensor, row: np.ndarray) -> Tensor:
    """Applies a layer with the weights of one point, by PyTorch."""
    weight, bias = (_mix(layer[name], row, x.dtype) for name in ("weights", "biases"))
    if weight.dim() == 2:
        y = F.linear(x, weight, bias)
    else:
        y = F.conv2d(x, weight, bias, padding=1, groups=layer.get("groups", 1))
    if "add" in layer:
        y = y + x
    if layer["activation"] == "identity":
        return y
    return {"relu": F.relu, "gelu": F.gelu}[layer["activation"]](y)


def make(name: str) -> Case:
    """Returns a case with random numbers of sensible sizes."""
    rows, points, widths = CASES[name]
    generator = np.random.default_rng(0)
    image, groups = "convolutions" in name, GROUPS if name.startswith("grouped") else 1

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    t = np.linspace(0, 1, points) if points > 1 else np.array([0.5])
    c = np.ascontiguousarray(np.stack([1 - t, t], 1))
    layers: list[dict[str, Any]] = []
    flops = 0.0
    for before, after in itertools.pairwise(widths):
        shape = (after, before // groups, 3, 3) if image else (after, before)
        scale = np.float32(np.sqrt(2 / np.prod(shape[1:])))
        weights = [draw(*shape) * scale for _ in range(2)]
        biases = [draw(after) * scale for _ in range(2)]
        layers.append({"op": "conv2d" if image else "linear", "coefficients": c})
        layers[-1] |= {"weights": weights, "biases": biases}
        layers[-1] |= {"activation": "gelu" if name.startswith("gelu") else "relu"}
        layers[-1] |= {"padding": (1, 1), "groups": groups} if image else {}
        if name.startswith("residual") and before == after:
            layers[-1]["add"] = len(layers) - 2  # the layer's own input
        flops += 2.0 * np.prod(shape) * (SIDE * SIDE if image else 1)
    if image:
        head = [draw(10, widths[-1] * SIDE * SIDE) * np.float32(0.01) for _ in range(2)]
        last: dict[str, Any] = {"op": "linear", "coefficients": c, "activation": "identity"}
        layers += [{"op": "flatten"}, last | {"weights": head, "biases": [draw(10), draw(10)]}]
    elif layers:
        layers[-1]["activation"] = "identity"
    shape = (rows, widths[0], SIDE, SIDE) if image else (rows, widths[0])
    labels = generator.integers(0, 10, rows)
    return Case([draw(*shape) * 3 for _ in range(2)], c, layers, labels, flops * rows * points)


def peaks(isas: list[str]) -> dict[str, Callable[[], float]]:
    """Returns, by instruction set, a function that measures a thread's multiply-add peak.

    In GFLOP/s.
    """
    found: dict[str, Callable[[], float]] = {}
    flags = {
        "avx512": ["-mfma", "-mavx512f", "-DLANES=16"],
        "avx2": ["-mfma", "-mavx2", "-DLANES=8"],
        "generic": ["-DLANES=4"],
    }
    always = "g++ -std=c++17 -O3 -ffp-contract=fast -fPIC -shared".split()
    for isa in isas:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "peak.so")
            subprocess.run([*always, *flags[isa], PEAK, "-o", library], check=True)
            function = ctypes.CDLL(str(library)).peak_gflops
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
        found[isa] = lambda function=function: float(function(0.03))  # type: ignore[misc]
    return found


def measure(
    case: Case, isa: str, peak: Callable[[], float], threads: int, repeats: int
) -> dict[str, float]:
    """Measures the best rates of the engine and the peaks, in GFLOP/s.

    Where there is no arithmetic to count, the engine's rate is in runs per second.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    a = torch.randn(2048, 2048)
    out = torch.empty_like(a)
    best = {"ours": 0.0, "fma": 0.0, "torch": 0.0}
    for _ in range(repeats):
        for name, run, work in (
            ("ours", lambda: case.sums(isa, threads), case.flops or 1e9),
            ("torch", lambda: torch.mm(a, a, out=out), 2.0 * 2048**3),
        ):
            start = clock()
            run()
            best[name] = max(best[name], work / (clock() - start) / 1e9)
        best["fma"] = max(best["fma"], peak() * threads)
    return best


def residual(case: Case, isa: str) -> tuple[float, bool]:
    """Returns the error of the mean losses against float64, and whether the policy allows it.

    Of a few points and rows.
    """
    part = case.first(200, 3)
    exact, plain = part.losses(torch.float64), part.losses(torch.float32)
    ours, theirs = (
        np.abs(v - exact).max() / np.abs(exact).max()
        for v in (part.sums(isa)[:, 0] / len(part.labels), plain)
    )
    return float(ours), bool(ours <= 2 * theirs + 2 * np.finfo(np.float32).eps)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa", default=",".join(isa for isa in engine.isas() if isa != "generic"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def _rate(case: Case, best: dict[str, float]) -> str:
    """Formats the rate of a case and its shares of the peaks."""
    ours = best["ours"]
    if case.flops:
        return f"{ours:>9.1f}{ours / best['fma']:>8.1%}{ours / best['torch']:>10.0%}"
    # no product: one point's time against a pass of the MNIST network at the peaks
    point = 1 / ours / len(case.coefficients)
    passes = [len(case.labels) * MNIST_PASS / (best[key] * 1e9) / point for key in ("fma", "torch")]
    return f"{'1/':>9}{passes[0]:<8.0f}{'1/':>3}{passes[1]:<7.0f}"


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    isas = options.isa.split(",")
    peak = peaks(isas)
    report: list[dict[str, Any]] = []
    columns = f"{'GFLOP/s':>9}{'of fma':>8}{'of torch':>10}{'residual':>10}"
    print(f"{'case':<56}{'isa':<8}{columns}  verdict")
    for name in [name for name in CASES if options.only in name]:
        case = make(name)
        for isa in isas:
            best = measure(case, isa, peak[isa], options.threads, options.repeats)
            error, good = residual(case, isa)
            about = {"case": name, "isa": isa, "threads": options.threads}
            report.append(about | best | {"residual": error, "pass": good})
            verdict = "PASS" if good else "FAIL"
            print(f"{name:<56}{isa:<8}{_rate(case, best)}{error:>10.1e}  {verdict}", flush=True)
    if options.json:
        result = {"machine": machine(), "cases": report}
        atomic_write(
            options.json, lambda stream: stream.write(json.dumps(result, indent=1).encode())
        )


if __name__ == "__main__":
    main()
