"""Ranks that share an evaluation: two processes measured against one, and a thousand simulated.

    python bench/scale.py              a simulation: bytes and waiting, up to 1,000 ranks
    python bench/scale.py --measure    one and two processes of one thread, a network for MNIST
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import numpy as np

# As modeconn/evaluation/ranks.py and request.py have them.
ROUND, ROWS = 8, 1024
SIZES, SPREADS = (2, 8, 64, 1000), (0.05, 0.2, 0.5)


def simulate(samples: int, points: int, metrics: int) -> None:
    """Print the bytes that ranks exchange, and the share of time in which they wait for others."""
    batches = -(-samples // ROWS)
    sums = 8 * metrics * (points + 1) + 8  # of a batch: sums, counts, samples
    print(f"{samples:,} samples, {points} points, {metrics} metrics: {batches:,} batches of {ROWS}")
    head = "".join(f"  busy, spread {spread:.0%}" for spread in SPREADS)
    print(f"{'ranks':>6}{'rounds':>8}{'sent, a rank':>14}{'received':>12}{head}")
    generator = np.random.default_rng(0)
    for size in SIZES:
        rounds = -(-batches // (size * ROUND))
        own = ROUND * sums * rounds
        busy = []
        for spread in SPREADS:
            sigma = np.sqrt(np.log1p(spread**2))  # of a lognormal time with that relative spread
            times = generator.lognormal(-(sigma**2) / 2, sigma, (min(rounds, 200), size, ROUND))
            rank = times.sum(2)  # all wait for the slowest of a round
            busy.append(rank.mean() / rank.max(1).mean())
        row = "".join(f"{share:18.0%}" for share in busy)
        print(f"{size:6,}{rounds:8,}{own / 1e6:11.2f} MB{own * size / 1e6:9.1f} MB{row}")


def measure(samples: int, points: int, repeats: int) -> None:
    """Time an evaluation in one process and in two, each of one thread."""
    seconds = {1: [], 2: []}
    for _ in range(repeats):
        for size, times in seconds.items():
            run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            arguments = [f"--nproc-per-node={size}", __file__, "--rank"]
            arguments += [f"--samples={samples}", f"--points={points}"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*run, *arguments], env=environment, capture_output=True, text=True, check=True
            )
            times.append(float(done.stdout.split()[-1]))
    least = {size: min(times) for size, times in seconds.items()}
    print(
        f"MLP 784-245×10-10, {samples:,} samples, {points} points, the least of {repeats}: "
        f"{least[1]:.2f} s in one process, {least[2]:.2f} s in two ({least[1] / least[2]:.2f}×)"
    )


def rank(samples: int, points: int) -> None:
    """Evaluate as one of the ranks; the first prints the seconds of the second call."""
    import torch
    import torch.distributed as dist

    import modeconn as mc
    from modeconn.models import build

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    a, b = (build("mlp:784-245x10-10") for _ in range(2))
    data = torch.randn(samples, 784), torch.randint(10, (samples,))
    path = mc.Line(a, b)
    mc.evaluate(a, path, (data[0][:200], data[1][:200]), points, progress=False)
    dist.barrier()
    started = time.perf_counter()
    mc.evaluate(a, path, data, points, progress=False)
    if dist.get_rank() == 0:
        print(time.perf_counter() - started)
    dist.destroy_process_group()


def main() -> None:
    """Parse, and do one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--points", type=int, default=101)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.rank:
        rank(options.samples, options.points)
    elif options.measure:
        measure(options.samples or 10_000, options.points, options.repeats)
    else:
        simulate(options.samples or 100_000_000, options.points, 2)


if __name__ == "__main__":
    main()
