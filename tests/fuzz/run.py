"""The long run: cases by their numbers until the time is up; findings are printed.

python tests/fuzz/run.py --minutes 60 --first 0
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from fuzz.check import Finding, check
from fuzz.draw import Seeded
from fuzz.grammar import draw_case
from modeconn.backends.native import extension as native

WAYS = [("reference", "float64"), ("auto", "float32"), ("native", "float64"), ("native", "float32")]


def ways() -> list[tuple[str, str]]:
    """Backends and precisions that can run here."""
    return WAYS if native.available() else WAYS[:2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument(
        "--step", type=int, default=1, help="every so many numbers, for several runs at once"
    )
    parser.add_argument("--only", type=int, help="one case, with its traceback")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # drawn checkpoints may be equal
    if options.only is not None:
        case = draw_case(Seeded(options.only))
        print(case)
        for way in ways():
            print(way, check(draw_case(Seeded(options.only)), *way), flush=True)
        return 0
    counts: Counter[str] = Counter()
    found: list[str] = []
    end, number = time.monotonic() + 60 * options.minutes, options.first
    while time.monotonic() < end:
        try:
            case = draw_case(Seeded(number))
            for way in ways():
                counts[check(case, *way)] += 1
        except Finding as finding:
            found.append(f"case {number} {way}: {str(finding)[:300]}")
            print(found[-1], flush=True)
        except Exception:
            print(f"case {number}: the fuzzer itself failed", flush=True)
            traceback.print_exc()
        number += options.step
    print(
        f"{number - options.first} numbers, {sum(counts.values())} evaluations, "
        f"{len(found)} findings"
    )
    for what, count in counts.most_common(20):
        print(f"{count:8}  {what}")
    return 1 if found else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
