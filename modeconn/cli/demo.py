"""`modeconn demo`: the barrier between two small networks, and the time that one pass saves."""

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
# cache, so that our own loop is a fair opponent.
ROWS_IN_CACHE = 512
OURS = "modeconn, one pass"


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "demo",
        help="train two small networks and show the barrier between them; needs no files",
        description="Train two small networks on scikit-learn's digits, evaluate the line between\n"
        "them, and time one pass against a pass per point.",
        epilog=options.example("modeconn demo --plot barrier.png"),
    )
    options.add_plot(parser, "the result")
    options.add_json(parser, "the result")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Trains, evaluates, times, prints."""
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
        _print_line(result)
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


def _print_line(result: PathResult) -> None:
    print("\nThe straight line between them:\n")
    output.print_plot(result)
    loss, error = result.barrier("loss"), 100 * result.barrier("error")
    print(f"\nbarrier in loss {loss:.3g}, in error {error:.3g} %")
    print("\nTiming a pass per point against one pass …", flush=True)


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
    """Times all contenders, the least of two interleaved runs each.

    Returns:
        Seconds for all points by contender, and the largest difference between their losses.
    """
    from torch.utils.data import DataLoader

    from modeconn.evaluation.evaluator import evaluate

    inputs, targets = data.slice(0, len(data))
    loader = DataLoader(data, batch_size=BATCH_SIZE)

    def split(rows: int) -> Batches:
        return list(zip(inputs.split(rows), targets.split(rows), strict=True))

    def loop(batches: Batches) -> Callable[[], np.ndarray]:
        return lambda: _pass_per_point(model, path, result.t, batches)

    contenders: dict[str, Callable[[], np.ndarray]] = {
        "a pass per point, DataLoader": loop(loader),
        "a pass per point, whole tensor": loop(split(len(data))),
        "a pass per point, rows in cache": loop(split(ROWS_IN_CACHE)),
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
    model: nn.Module, path: Path, points: np.ndarray, batches: Batches
) -> np.ndarray:
    """Computes the losses by the usual loop: load the weights of a point, go through the data."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    model.eval()
    losses = []
    with torch.inference_mode():
        for t in points:
            model.load_state_dict(path.at(t))
            loss, wrong, samples = 0.0, 0.0, 0
            for inputs, targets in batches:
                outputs = model(inputs)
                loss += cross_entropy(outputs, targets, reduction="sum").item()
                wrong += (outputs.argmax(1) != targets).sum().item()
                samples += len(targets)
            losses.append(loss / samples)
    return np.array(losses)


def _fixed_cost(model: nn.Module, path: Path, data: Images) -> float:
    """Times an evaluation of one point and one image.

    This is what capture and planning take, whatever the number of samples and points.
    """
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
        f"Loss and error at {len(result.t)} points over {images}, on this machine, "
        "the least of two runs:\n"
    )
    rows = [
        [name, output.seconds_text(taken), f"{taken / timings[OURS]:.2f}"]
        for name, taken in timings.items()
    ]
    output.print_table(["", "time", "ratio"], rows)
    planning, first = output.seconds_text(fixed), output.seconds_text(result.seconds)
    print(
        f"\nThe plan took {planning} of the one pass, whatever the number of samples and points. "
        "A model's first\nevaluation traces it as well: "
        f"the one plotted above took {first} in all. "
        f"The losses of all four agree to {furthest:.0e}."
    )
