"""The table of docs/alignment.md: a line between two networks, aligned or not, with REPAIR or not.

    .venv/bin/python bench/alignment.py mnist --checkpoints DIR --data-root DIR [--json FILE]

Prints the loss and the error in the middle of the line on training and test data, beside the ends',
and the CPU seconds that the alignment took.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import nn

import modeconn as mc
from modeconn import models
from modeconn.parameters.state import State


@dataclass
class Pair:
    """Two networks of one architecture.

    Attributes:
        spec: of the model.
        files: of the networks, with {} for the seed.
        data: the data set.
        train, test: samples that are evaluated.
        samples: that units are compared on.
    """

    spec: str
    files: str
    data: str
    train: int
    test: int
    samples: int


PAIRS = {
    "mnist": Pair(
        "mlp:784-245x10-10", "mnist-fcn-10x245-seed{}.safetensors", "mnist", 20000, 10000, 10000
    ),
    "vgg": Pair(
        "vgg11:width=16", "cifar10-vgg11-w16-seed{}.safetensors", "cifar10", 1500, 1000, 2000
    ),
    "resnet": Pair(
        "resnet20:width=16", "resnet20-w16-seed{}.safetensors", "cifar10", 1000, 1000, 1000
    ),
}
# Rows of a batch whose statistics are one estimate.
BATCH = 500


@dataclass
class Row:
    """The middle of a line.

    Attributes:
        align_cpu: seconds of all threads that the alignment took.
        loss, error: on training data.
        test_error: in the middle.
        ends: the test error of both ends.
    """

    pair: str
    method: str
    repaired: bool
    align_cpu: float
    loss: float
    error: float
    test_error: float
    ends: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument("--checkpoints", required=True, type=Path)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--methods", default="none,activations,weights")
    parser.add_argument(
        "--rows", type=int, help="use so many rows at most of each set: for a trial"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pair = PAIRS[args.pair]
    if args.rows is not None:
        sizes = {name: min(getattr(pair, name), args.rows) for name in ("train", "test", "samples")}
        pair = replace(pair, **sizes)
    model = models.build(pair.spec).eval()
    a, b = (mc.load(args.checkpoints / pair.files.format(seed)) for seed in (1, 2))
    a, b = (named(model, state) for state in (a, b))
    train = mc.datasets.load(pair.data, args.data_root, "train")
    test = mc.datasets.load(pair.data, args.data_root, "test")
    rows = []
    for method in args.methods.split(","):
        start = time.process_time()
        aligned = b
        if method != "none":
            x = train.slice(0, 8)[0]
            found = mc.align(model, a, b, train, method=method, samples=pair.samples, sample=x)
            print(found, flush=True)
            aligned = found.apply(b)
        seconds = time.process_time() - start
        for repaired in (False, True):
            row = measured(pair, model, (a, aligned), (train, test), repaired)
            rows.append(Row(args.pair, method, repaired, seconds, *row))
            print(line(rows[-1]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def named(model: nn.Module, state: State) -> State:
    """The state under the model's names: those of an nn.Sequential are in the same order."""
    own = model.state_dict()
    return state if state.keys() == own.keys() else dict(zip(own, state.values(), strict=True))


def measured(
    pair: Pair,
    model: nn.Module,
    ends: tuple[State, State],
    data: tuple[mc.datasets.Images, mc.datasets.Images],
    repaired: bool,
) -> tuple[float, float, float, tuple[float, float]]:
    """Evaluate a line: its middle's loss, error and test error, and its ends' test errors."""
    train, test = data[0].slice(0, pair.train), data[1].slice(0, pair.test)
    path = mc.Line(*ends)
    options = {}
    if repaired:
        model, path = mc.repair(model, path, data[0], samples=min(2000, pair.samples))
        options = {"buffers": "recompute", "recompute_data": "train", "batch_size": BATCH}
    found = mc.evaluate(model, path, {"train": train, "test": test}, [0.0, 0.5, 1.0], **options)
    on_train, on_test = found["train"], found["test"]
    return (
        float(on_train.loss[1]),
        float(on_train.error[1]),
        float(on_test.error[1]),
        (float(on_test.error[0]), float(on_test.error[2])),
    )


def line(row: Row) -> str:
    ends = " ".join(f"{100 * end:.1f}" for end in row.ends)
    return (
        f"{row.pair:7} {row.method:12} {'repaired' if row.repaired else 'line':9}"
        f"loss {row.loss:6.3f} error {100 * row.error:5.1f} % | "
        f"test error {100 * row.test_error:5.1f} % (ends {ends}) | {row.align_cpu:6.1f} CPU s"
    )


if __name__ == "__main__":
    main()
