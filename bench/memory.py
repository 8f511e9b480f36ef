"""Peak memory of evaluations at few points against many: it does not grow with their number.

    python bench/memory.py                    MNIST line, ResNet-20, GPT and recomputed statistics
    python bench/memory.py --few 11 --many 1001 --samples 64

Each evaluation runs in a process of its own. Prints the peak resident memory of both, and the cost
of a further point. Only the result must grow (8 bytes a metric and point) and, with recomputed
statistics, 8 bytes a channel and point.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

CASES = ("mnist", "resnet", "gpt", "recompute")


def peak(case: str, points: int, samples: int) -> int:
    """Measures the peak resident bytes of an evaluation in a fresh process."""
    options = "--case", case, "--many", str(points), "--samples", str(samples)
    command = [sys.executable, __file__, *options]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def evaluate(case: str, points: int, samples: int) -> None:
    """Runs an evaluation, then prints the process's peak."""
    import modeconn as mc
    import workloads

    lines = {"mnist": workloads.mnist_line, "gpt": workloads.gpt_line}
    work = lines.get(case, workloads.resnet_line)(samples)
    buffers = "recompute" if case == "recompute" else "start"
    data, rows = (work.x, work.y), min(samples, 64)
    mc.evaluate(work.model, work.path, data, points, buffers=buffers, batch_size=rows)
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--few", type=int, default=11)
    parser.add_argument("--many", type=int, default=1001)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        evaluate(options.case, options.many, options.samples)
        return
    print(f"{'':<12}{options.few:>10} points{options.many:>10} points{'bytes a point':>16}")
    for case in CASES:
        few, many = (peak(case, points, options.samples) for points in (options.few, options.many))
        each = (many - few) / (options.many - options.few)
        print(f"{case:<12}{few / 2**20:>13.0f} MiB{many / 2**20:>13.0f} MiB{each:>16.0f}")


if __name__ == "__main__":
    main()
