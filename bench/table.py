"""Times contenders side by side and prints their table."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

# A call, its number of points, and the arithmetic that its way of working needs per point.
Contender = tuple[Callable[[], Any], int, float]


def matrix_peak(repeats: int = 5) -> float:
    """Measures the fastest float32 matrix product, in FLOP/s."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / min(timed(lambda: a @ b) for _ in range(repeats))


def timed(call: Callable[[], Any]) -> float:
    """Measures the wall time of a call, in seconds."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def machine() -> dict[str, Any]:
    """Describes the machine and the versions of a measurement."""
    cpuinfo = Path("/proc/cpuinfo")
    rows = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (row.split(":")[1].strip() for row in rows if row.startswith("model name")),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
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


def measured(
    contenders: Mapping[str, Contender], repeats: int, warm: bool = False
) -> dict[str, Any]:
    """Measures seconds per point of each contender, which take turns, and the run's peak."""
    if warm:
        for run, _, _ in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = []
    for _ in range(repeats):
        peaks.append(matrix_peak())
        for name, (run, points, _) in contenders.items():
            seconds[name].append(timed(run) / points)
    return {
        "machine": machine(),
        "peak_gflops": max(peaks) / 1e9,
        "seconds_per_point": seconds,
        "flops_per_point": {name: flops for name, (_, _, flops) in contenders.items()},
    }


def show(report: dict[str, Any]) -> None:
    """Prints the table of a report."""
    best = {name: min(times) for name, times in report["seconds_per_point"].items()}
    first = next(iter(best))
    print(f"\n{report['workload']}, {report['points']} points ({report['source']})")
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(f"peak {report['peak_gflops']:.0f} GFLOP/s\n")
    print(f"{'':<30}{'ms per point':>13}{'spread':>8}{'ratio to ours':>15}{'of peak':>9}")
    for name, value in best.items():
        share = report["flops_per_point"][name] / value / 1e9 / report["peak_gflops"]
        spread = max(report["seconds_per_point"][name]) / value - 1
        line = f"{name:<30}{1e3 * value:>13.1f}{spread:>8.0%}"
        print(f"{line}{value / best[first]:>14.2f}x{share:>9.0%}")
