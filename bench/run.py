"""The side-by-side table: modeconn against what people do by hand, in one run on one machine.

    python bench/run.py                       the line between two MNIST networks, 101 points, 60,000 samples
    python bench/run.py --samples 6000 --points 11 --json out.json
    python bench/run.py --vgg --samples 10000 --points 21     two slim VGG-11 on CIFAR-10
    python bench/run.py --accuracy            also the distance from a float64 pass per point, at every point
    python bench/run.py --chain               chains whose segments move dead units, or the last layer

Contenders take turns, each turn timed on its own; the minimum over the repeats is shown. A pass per point costs the same
at every point, so the slow peers are timed on a few points and quoted per point. "Peak" is the fastest float32 matrix
product (2048³, all threads) that PyTorch reaches in the same run; its share is of the arithmetic that the contender's way
of working needs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

import modeconn as mc
import peers
import workloads
from modeconn.backends import NAMES
from modeconn.state import atomic_write


def matrix_peak(repeats: int = 5) -> float:
    """The fastest float32 matrix product, FLOP/s."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / min(timed(lambda: a @ b) for _ in range(repeats))


def timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((row.split(":")[1].strip() for row in rows if row.startswith("model name")), platform.processor())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": model,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": commit,
        "date": date.today().isoformat(),
        "load": os.getloadavg()[0],
    }


def line(options: argparse.Namespace) -> dict[str, Any]:
    """The line: ours at all points, the others at a few."""
    if options.model:
        work = workloads.random_line(options.model, options.samples)
    else:
        work = (workloads.vgg_line if options.vgg else workloads.mnist_line)(options.samples)
    few = np.linspace(0, 1, options.peer_points)
    ours = np.linspace(0, 1, options.points)
    plan = mc.explain(work.model, work.path, work.x[:4], options.points)
    naive = plan.program.naive_flops * len(work.x)
    args = (work.model, work.path, work.x, work.y)
    results: dict[str, Any] = {}

    def one_pass(backend: str) -> Callable[[], Any]:
        return lambda: results.update({backend: mc.evaluate(work.model, work.path, (work.x, work.y), ours, backend=backend)})

    contenders: dict[str, tuple[Callable[[], Any], int, float]] = {
        f"modeconn ({name})": (one_pass(name), len(ours), plan.flops * len(work.x) / len(ours)) for name in options.backends
    }
    convolutional = work.x.dim() == 4
    rows = (128, 500) if convolutional else (500, 1000, 2000)
    others: dict[str, peers.Peer] = {"DataLoader loop, batch 100": peers.dataloader_loop}
    if convolutional:
        others["channels_last loop, batch 128"] = peers.channels_last_loop
    else:
        others["whole tensor at once"] = peers.whole_tensor
    others |= {f"functional_call, {n} rows": peers.functional_chunks(n) for n in rows}
    others[f"vmap, 8 points, {rows[-2]} rows"] = peers.vmap_points(8, rows[-2])
    for name, peer in others.items():
        points = np.linspace(0, 1, 8) if name.startswith("vmap") else few
        contenders[name] = (functools.partial(peer, *args, points), len(points), naive)
    for run, _, _ in contenders.values():
        run() if options.warm else None
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = []
    for _ in range(options.repeats):
        peaks.append(matrix_peak())
        for name, (run, points, _) in contenders.items():
            seconds[name].append(timed(run) / points)
    report = {
        "workload": work.name,
        "source": work.source,
        "points": options.points,
        "machine": machine(),
        "peak_gflops": max(peaks) / 1e9,
        "seconds_per_point": seconds,
        "flops_per_point": {name: flops for name, (_, _, flops) in contenders.items()},
    }
    show(report)
    if options.accuracy:
        report["accuracy"] = accuracy(work, results, options)
    return report


def show(report: dict[str, Any]) -> None:
    """Print the table of a report."""
    best = {name: min(times) for name, times in report["seconds_per_point"].items()}
    first = next(iter(best))
    print(f"\n{report['workload']}, {report['points']} points ({report['source']})")
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"peak {report['peak_gflops']:.0f} GFLOP/s\n")
    print(f"{'':<30}{'ms per point':>13}{'spread':>8}{'ratio to ours':>15}{'of peak':>9}")
    for name, value in best.items():
        share = report["flops_per_point"][name] / value / 1e9 / report["peak_gflops"]
        spread = max(report["seconds_per_point"][name]) / value - 1
        print(f"{name:<30}{1e3 * value:>13.1f}{spread:>8.0%}{value / best[first]:>14.2f}x{share:>9.0%}")


def accuracy(work: workloads.Workload, results: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Distances of the losses from a float64 pass per point, at every point."""
    t = np.linspace(0, 1, options.points)
    model = copy.deepcopy(work.model).double()
    points = [{k: v.double() for k, v in point.items()} for point in work.path.control_points]
    exact, exact_error = peers.functional_chunks(1000)(model, mc.Line(*points), work.x.double(), work.y, t)
    plain, plain_error = peers.functional_chunks(1000)(work.model, work.path, work.x, work.y, t)
    figures: dict[str, Any] = {"plain float32": _distance(plain, plain_error, exact, exact_error)}
    for name in options.backends:
        figures[f"modeconn ({name})"] = _distance(results[name].loss, results[name].error, exact, exact_error)
    print(f"\n{'against float64':<30}{'loss, relative':>15}{'errors that differ':>20}")
    for name, (loss, error) in figures.items():
        print(f"{name:<30}{loss:>15.2e}{error * len(work.x):>20.0f}")
    print(f"passes over the data: {results[options.backends[0]].passes}")
    return figures


def _distance(loss: np.ndarray, error: np.ndarray, exact: np.ndarray, exact_error: np.ndarray) -> tuple[float, float]:
    return float(np.abs(loss - exact).max() / np.abs(exact).max()), float(np.abs(error - exact_error).max())


def chain(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What a further point costs on segments that move dead units, or the last layer."""
    reports = []
    for backend, kind in itertools.product(options.backends, ("rewrite", "swing")):
        work = workloads.mnist_chain(options.samples, 2, kind)
        forward, few, many = (seconds(work, points, backend, options.repeats) for points in ([0.0], 21, 2021))
        per_point = max(0.0, many - few) / 2000
        once = [mc.explain(work.model, work.path, work.x[:4], points).network_flops for points in (21, 2021)]
        print(f"{work.name} ({backend}): forward pass {1e3 * forward:.0f} ms, a further point {1e6 * per_point:.0f} us")
        print(f"  = 1/{forward / max(per_point, 1e-9):.0f} of it; the network: {once[0]:.0f} and {once[1]:.0f} FLOP a sample")
        reports.append(
            {
                "workload": work.name,
                "backend": backend,
                "forward_s": forward,
                "per_point_s": per_point,
                "machine": machine(),
            }
        )
    return reports


def seconds(work: workloads.Workload, points: Any, backend: str, repeats: int) -> float:
    """The least time of an evaluation."""
    return min(
        timed(lambda: mc.evaluate(work.model, work.path, (work.x, work.y), points, backend=backend)) for _ in range(repeats)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--points", type=int, default=101)
    parser.add_argument("--peer-points", type=int, default=3, help="points at which a pass per point is timed (default 3)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--model", metavar="SPEC", help="two random networks of this kind instead, such as mlp:784-512x3-10")
    parser.add_argument("--vgg", action="store_true", help="the two slim VGG-11 on CIFAR-10 instead")
    parser.add_argument("--backends", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument(
        "--warm", action=argparse.BooleanOptionalAction, default=False, help="run everything once, untimed, first"
    )
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    report = chain(options) if options.chain else line(options)
    if options.json:
        atomic_write(options.json, lambda stream: stream.write(json.dumps(report, indent=1).encode()))


if __name__ == "__main__":
    main()
