"""`modeconn demo`: two small networks, the barrier between them, and what one pass saves.  Needs no files."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from modeconn.cli import options, output

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from modeconn.data.datasets import Images
    from modeconn.evaluation.result import PathResult
    from modeconn.parameters.paths import Path
    from modeconn.parameters.state import State

    Batches = Iterable[tuple[Tensor, Tensor]]

# Large enough that most of what is timed is arithmetic, and trained in seconds.
MODEL, POINTS = "mlp:64-256x4-10", 51
LR, BATCH_SIZE = 0.01, 100
# Rows that a plain loop evaluates at once: about as many as keep a layer's activations in a core's
# cache.
ROWS_IN_CACHE = 512
OURS = "modeconn, one pass"


def add(commands: options.Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "demo",
        help="train two small networks and show the barrier between them; needs no files",
        description="Train two small networks on scikit-learn's digits, evaluate the line between\n"
        "them, and time one pass against a pass per point.",
        epilog=options.example("modeconn demo --plot barrier.png"),
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the result: .png, .svg or .pdf")
    parser.add_argument(
        "--json", metavar="FILE", help="write it as JSON; - is stdout, and nothing else then is"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, time, print."""
    options.check_outputs({"--plot": args.plot, "--json": args.json})
    options.check_plot(args.plot)

    from modeconn.cli.train import new_model
    from modeconn.data import datasets
    from modeconn.evaluation.evaluator import evaluate
    from modeconn.parameters.paths import Line

    talk = args.json != "-"
    data = datasets.load("digits")
    if talk:
        images = output.counted(len(data), "image")
        print(f"Two networks {MODEL} on digits ({images} of 8 × 8), from different seeds:\n")
    path = Line(*(_trained(seed, data, talk) for seed in (1, 2)))
    model = new_model(MODEL, 0)
    result = evaluate(model, path, data, points=POINTS, progress=False)
    if talk:
        print("\nThe straight line between them:\n")
        output.print_plot(result)
        print(
            f"\nbarrier in loss {result.barrier('loss'):.3g}, in error {100 * result.barrier('error'):.3g} %"
        )
        print("\nTiming a pass per point against one pass …", flush=True)
    timings, furthest = _race(model, path, data, result)
    fixed = _fixed_cost(model, path, data)
    result.info |= {"model": MODEL, "data": "digits train", "normalization": data.normalization}
    if args.plot is not None:
        output.write_plot(result, args.plot)
    if args.json is not None:
        extra = {
            "seconds": timings,
            "seconds_to_capture": fixed,
            "largest_difference_in_loss": furthest,
        }
        output.write_json({**result.to_dict(), "demo": extra}, args.json)
    if talk:
        _print_race(result, timings, fixed, furthest)
        output.print_written(args.plot, args.json)


def _trained(seed: int, data: Images, talk: bool) -> State:
    from modeconn.cli.train import new_model
    from modeconn.parameters import state
    from modeconn.training.train import train

    model = new_model(MODEL, seed)
    report = train(model, data, lr=LR, batch_size=BATCH_SIZE, seed=seed)
    if talk:
        epochs, taken = output.counted(report.epochs, "epoch"), output.seconds_text(report.seconds)
        print(f"  seed {seed}: {report.stopped} after {epochs}, {taken}", flush=True)
    return state.load(model)


def _race(
    model: nn.Module, path: Path, data: Images, result: PathResult
) -> tuple[dict[str, float], float]:
    """Seconds for all points by contender, the least of two interleaved runs; and how far losses differ."""
    from torch.utils.data import DataLoader

    from modeconn.evaluation.evaluator import evaluate

    inputs, targets = data.slice(0, len(data))
    loader = DataLoader(data, batch_size=BATCH_SIZE)

    def batches(rows: int) -> Batches:
        return zip(inputs.split(rows), targets.split(rows), strict=True)

    contenders: dict[str, Callable[[], np.ndarray]] = {
        "a pass per point, DataLoader": lambda: _pass_per_point(
            model, path, result.t, lambda: loader
        ),
        "a pass per point, whole tensor": lambda: _pass_per_point(
            model, path, result.t, lambda: batches(len(data))
        ),
        "a pass per point, rows in cache": lambda: _pass_per_point(
            model, path, result.t, lambda: batches(ROWS_IN_CACHE)
        ),
        OURS: lambda: evaluate(model, path, data, points=result.t, progress=False).loss,
    }
    timings = dict.fromkeys(contenders, float("inf"))
    furthest = 0.0
    for _ in range(2):
        for name, contender in contenders.items():
            began = time.perf_counter()
            loss = contender()
            timings[name] = min(timings[name], time.perf_counter() - began)
            furthest = max(furthest, float(abs(loss - result.loss).max()))
    return timings, furthest


def _pass_per_point(
    model: nn.Module, path: Path, points: np.ndarray, batches: Callable[[], Batches]
) -> np.ndarray:
    """The losses by the usual loop: load the weights of each t, go through the data, add up loss, errors."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    losses = []
    with torch.inference_mode():
        for t in points:
            model.load_state_dict(path.at(t))
            loss, wrong, samples = 0.0, 0.0, 0
            for inputs, targets in batches():
                outputs = model(inputs)
                loss += cross_entropy(outputs, targets, reduction="sum").item()
                wrong += (outputs.argmax(1) != targets).sum().item()
                samples += len(targets)
            losses.append(loss / samples)
    return np.array(losses)


def _fixed_cost(model: nn.Module, path: Path, data: Images) -> float:
    """Seconds for one point and one image: what capturing and planning take, whatever the data and points."""
    from modeconn.evaluation.evaluator import evaluate

    taken = []
    for _ in range(2):
        began = time.perf_counter()
        evaluate(model, path, data.slice(0, 1), points=1, progress=False)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _print_race(
    result: PathResult, timings: dict[str, float], fixed: float, furthest: float
) -> None:
    images = output.counted(result.samples, "image")
    print(
        f"Loss and error at {len(result.t)} points over {images}, on this machine, the least of two runs:\n"
    )
    rows = [
        [name, output.seconds_text(taken), f"{taken / timings[OURS]:.2f}"]
        for name, taken in timings.items()
    ]
    output.print_table(["", "time", "ratio"], rows)
    print(
        f"\nOf the one pass, {output.seconds_text(fixed)} went into the plan: no more for more data or points. A model's "
        f"first evaluation traces it as well:\nthe one plotted above took {output.seconds_text(result.seconds)} in all. "
        f"The losses of all four agree to {furthest:.0e}."
    )
