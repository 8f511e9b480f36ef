"""`modeconn evaluate`: loss and error along the path between checkpoints."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from modeconn.cli import options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from modeconn.evaluation.result import PathResult
    from modeconn.parameters import paths

# Kind of path: fewest and most checkpoints.
PATHS = {"line": (2, 2), "polychain": (2, None), "bezier": (2, None), "plane": (3, 3)}
POINTS, POINTS_OF_A_PLANE = 101, 21
RESULT_SUFFIXES = (".npz", ".json")


def add(commands: options.Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "evaluate",
        help="loss and error along the path between checkpoints, in one pass over the data",
        description="Loss and error along the path between checkpoints, in one pass over the data.",
        epilog=options.example(
            "modeconn evaluate a.safetensors b.safetensors --data digits --plot barrier.png"
        ),
    )
    add_path(parser)
    options.add_data(parser)
    add_computing(parser)
    add_results(parser)
    parser.set_defaults(run=run)


def add_computing(parser: argparse.ArgumentParser) -> None:
    """The options that say what is computed, and how."""
    computing = parser.add_argument_group("computing")
    computing.add_argument(
        "--loss",
        metavar="NAME",
        default="cross_entropy",
        help="cross_entropy, mse or bce (default: cross_entropy)",
    )
    computing.add_argument(
        "--metrics",
        metavar="NAMES",
        type=options.names,
        help="of loss, error, top5_error, separated by commas (default: loss,error)",
    )
    computing.add_argument(
        "--buffers",
        choices=("interpolate", "start", "recompute"),
        default="interpolate",
        help="the statistics of batch norms between the networks; recompute: from the training data, in a second pass "
        "(default: interpolate)",
    )
    computing.add_argument(
        "--backend",
        metavar="NAME",
        default="auto",
        help="auto, reference, native or triton (default: auto, the fastest that can)",
    )
    computing.add_argument(
        "--precision",
        metavar="NAME",
        default="float32",
        help="float32 or float64; on a GPU also tf32 or bf16 (default: float32)",
    )
    computing.add_argument(
        "--batch-size",
        metavar="N",
        type=options.count,
        help="samples read at a time (default: chosen for the model)",
    )
    computing.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1, … (default: cpu)")


def add_results(parser: argparse.ArgumentParser, plot: bool = True) -> None:
    """The options that say where results go."""
    results = parser.add_argument_group("results")
    if plot:
        results.add_argument("--plot", metavar="FILE", help="draw the result: .png, .svg or .pdf")
    results.add_argument(
        "--save",
        metavar="FILE",
        help="keep the result for mc.PathResult.load: .npz or .json; interrupted, the same command goes on",
    )
    results.add_argument(
        "--json",
        metavar="FILE",
        help="write the result as JSON; - is stdout, and nothing else then is",
    )
    results.add_argument(
        "--quiet", "-q", action="store_true", help="print nothing, and show no progress"
    )


def add_path(parser: argparse.ArgumentParser) -> None:
    """The options that say which path between which networks, and where on it."""
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help="two or more: .safetensors, or .pt that holds weights only",
    )
    options.add_model(parser, required=False)
    parser.add_argument(
        "--path",
        choices=tuple(PATHS),
        help="through the checkpoints (default: line, polychain for three or more)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--points",
        metavar="N",
        type=options.count,
        help=f"evenly spaced points; for a plane N × N (default: {POINTS}, for a plane {POINTS_OF_A_PLANE})",
    )
    where.add_argument(
        "--at",
        metavar="T,T,…",
        type=options.numbers,
        help="these points instead, such as 0,0.25,1; write --at=-0.1,0 where the first is negative",
    )


def check_path(args: argparse.Namespace) -> str:
    """The kind of path, where the checkpoints are there and as many as it needs."""
    kind = args.path or ("line" if len(args.checkpoints) <= 2 else "polychain")
    fewest, most = PATHS[kind]
    given = len(args.checkpoints)
    if given < fewest or (most is not None and given > most):
        expected = f"{fewest}" if most == fewest else f"at least {fewest}"
        raise ModeconnError(
            f"a {kind} goes through {expected} checkpoints, got {given}: {', '.join(args.checkpoints)}"
        )
    if kind == "plane" and args.at is not None:
        raise ModeconnError("--at takes points of a curve, not of a plane: use --points")
    options.check_inputs(args.checkpoints)
    return kind


def make_path(kind: str, files: list[str]) -> paths.Path:
    """The path through checkpoint files."""
    from modeconn.parameters import paths

    if kind == "plane":
        return paths.Plane.through(*files)
    if kind == "line":
        return paths.Line(*files)
    return (paths.PolyChain if kind == "polychain" else paths.Bezier)(files)


def points_of(args: argparse.Namespace, kind: str) -> int | np.ndarray:
    """What --points or --at say, or the default."""
    import numpy as np

    if args.at is not None:
        return np.array(args.at)
    return int(args.points or (POINTS_OF_A_PLANE if kind == "plane" else POINTS))


def run(args: argparse.Namespace) -> None:
    """Check everything, evaluate, print and write."""
    kind = check_path(args)
    check_results(args)
    spec, model = options.load_model(args, args.checkpoints)
    path = make_path(kind, args.checkpoints)
    result = evaluated(args, spec, model, path, points_of(args, kind))
    report(result, args)


def check_results(args: argparse.Namespace, **more: str | None) -> None:
    """Check the options of `add_results`, and other files to write, before anything is computed."""
    plot = getattr(args, "plot", None)
    options.check_outputs(
        {"--plot": plot, "--save": args.save, "--json": args.json, **more}, args.checkpoints
    )
    options.check_plot(plot)
    if args.save is not None and not args.save.lower().endswith(RESULT_SUFFIXES):
        raise ModeconnError(
            f"--save {args.save}: the name must end in {' or '.join(RESULT_SUFFIXES)}"
        )


def evaluated(
    args: argparse.Namespace,
    spec: str,
    model: nn.Module,
    path: paths.Path,
    points: int | np.ndarray,
    resume: bool = True,
) -> PathResult:
    """The evaluation that the options ask for, with what it was of noted in the result."""
    from modeconn.evaluation.evaluator import evaluate

    data = options.load_data(args)
    unfinished = f"{args.save}.unfinished" if args.save is not None and resume else None
    try:
        result = evaluate(
            model,
            path,
            data,
            points=points,
            loss=args.loss,
            metrics=args.metrics,
            buffers=args.buffers,
            backend=args.backend,
            device=args.device,
            batch_size=args.batch_size,
            precision=args.precision,
            progress=output.on_terminal() and not args.quiet,
            recompute_data=options.load_data(args, "train")
            if args.buffers == "recompute" and args.split != "train"
            else None,
            resume=unfinished,
        )
    except KeyboardInterrupt:
        if unfinished is None or not Path(unfinished).exists():
            raise
        raise KeyboardInterrupt(
            f"interrupted; what is done is in {unfinished}: the same command goes on from there"
        ) from None
    result.info |= {
        "model": spec,
        "checkpoints": ", ".join(args.checkpoints),
        "data": f"{args.data} {args.split}",
        "normalization": data.normalization,
    }
    return result


def write(result: PathResult, args: argparse.Namespace) -> None:
    """Write the result where the options say; what was kept of the unfinished evaluation can go then."""
    if args.save is not None:
        result.save(args.save)
        with contextlib.suppress(FileNotFoundError):
            Path(f"{args.save}.unfinished").unlink()
    if args.json is not None:
        output.write_json(result.to_dict(), args.json)


def report(result: PathResult, args: argparse.Namespace, **drawn: str | None) -> None:
    """Write the files that were asked for, and print the rest."""
    if args.plot is not None:
        output.write_plot(result, args.plot)
    write(result, args)
    if args.quiet or args.json == "-":
        return
    output.print_result(result)
    output.print_written(args.plot, *drawn.values(), args.save, args.json)
