"""`modeconn evaluate`: loss and error along the path between checkpoints.

Its options and steps serve the other commands that evaluate: `explain`, `plane` and `mix`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn.backends import NAMES as BACKENDS
from modeconn.cli import finished, launched, options, output
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import BUFFERS, PRECISIONS
from modeconn.metrics import LOSSES, METRICS
from modeconn.parameters.path_files import metadata_of

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from modeconn.evaluation.layer_table import LayerTable
    from modeconn.evaluation.predictions import Ensemble
    from modeconn.evaluation.result import PathResult
    from modeconn.parameters import paths

# Kind of path: fewest and most checkpoints.
CURVE = "curve"  # in one file of its own
PATHS = {"line": (2, 2), "polychain": (2, None), "bezier": (2, None), "plane": (3, 3)}
POINTS, POINTS_OF_A_PLANE = 101, 21
RESULT_SUFFIXES = (".npz", ".json")


def add(commands: options.Commands) -> None:
    """Declares the command."""
    summary = "Loss and error along the path between checkpoints, in one pass over the data"
    parser = commands.add_parser(
        "evaluate",
        help=summary[0].lower() + summary[1:],
        description=f"{summary}.",
        epilog=options.example(
            "modeconn evaluate a.safetensors b.safetensors --data digits --plot barrier.png"
        ),
    )
    add_path(parser)
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="also the ensemble of all points: the mean of their probabilities, its calibration, "
        "and how often they disagree, in one more pass",
    )
    options.add_data(parser)
    add_computing(parser)
    add_results(parser)
    parser.set_defaults(run=run)


def add_path(parser: argparse.ArgumentParser) -> None:
    """Declares the options for the networks, the path between them, and the points on it."""
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help=f"two or more: {options.CHECKPOINT}; or the file of modeconn curve",
    )
    options.add_model(parser, required=False)
    parser.add_argument(
        "--path",
        choices=tuple(PATHS),
        help="path through the checkpoints (default: line, polychain for three or more)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--points",
        metavar="N",
        type=options.points,
        help="number of evenly spaced points, for a plane N × N; adaptive: as few as find the "
        f"largest values of a curve (default: {POINTS}, for a plane {POINTS_OF_A_PLANE})",
    )
    where.add_argument(
        "--at",
        metavar="T,T,…",
        type=options.numbers,
        help="these points instead, such as 0,0.25,1; --at=-0.1,0 where the first is negative",
    )


def add_computing(parser: argparse.ArgumentParser) -> None:
    """Declares the options for what is computed, and by which means."""
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--loss",
        metavar="NAME",
        default="cross_entropy",
        help=f"{options.listed(LOSSES)} (default: cross_entropy)",
    )
    group.add_argument(
        "--metrics",
        metavar="NAMES",
        type=options.names,
        help=f"any of {', '.join(METRICS)}, separated by commas (default: loss, and error where "
        "the loss has one)",
    )
    group.add_argument(
        "--buffers",
        choices=BUFFERS,
        default=BUFFERS[0],
        help="running statistics of batch norms between the networks; recompute: estimated from "
        f"the training data, in a second pass (default: {BUFFERS[0]})",
    )
    group.add_argument(
        "--backend",
        metavar="NAME",
        default="auto",
        help=f"{options.listed(('auto', *BACKENDS))} (default: auto, the fastest that can)",
    )
    exact, reduced = list(PRECISIONS)[:2], list(PRECISIONS)[2:]
    group.add_argument(
        "--precision",
        metavar="NAME",
        default="float32",
        help=f"{options.listed(exact)}; on a GPU also {options.listed(reduced)} (default: float32)",
    )
    group.add_argument(
        "--ignore",
        metavar="NAMES",
        type=options.names,
        default=(),
        help="entries of config.json in which folders may differ, separated by commas",
    )
    options.add_batch_size(group)
    options.add_device(group, None)


def add_results(
    parser: argparse.ArgumentParser, plot: bool = True, suffixes: tuple[str, ...] = RESULT_SUFFIXES
) -> None:
    """Declares the options for where results go."""
    group = parser.add_argument_group("results")
    if plot:
        options.add_plot(group, "the result")
    group.add_argument(
        "--save",
        metavar="FILE",
        help=f"keep the result for {'mc.PathResult' if len(suffixes) > 1 else 'mc.LayerTable'}"
        f".load: {options.listed(suffixes)}; after an interruption the same command continues "
        "(but for --points adaptive)",
    )
    options.add_csv(group)
    options.add_json(group, "the result")
    options.add_quiet(group)


def check_path(args: argparse.Namespace) -> str:
    """Checks the checkpoints and their number.

    Returns:
        The kind of path.
    """
    curves = [file for file in args.checkpoints if metadata_of(file)]
    if curves:
        if len(args.checkpoints) > 1 or args.path is not None:
            raise ModeconnError(f"{curves[0]} is a whole path: expected it alone, and no --path")
        return CURVE
    kind = args.path or ("line" if len(args.checkpoints) <= 2 else "polychain")
    fewest, most = PATHS[kind]
    given = len(args.checkpoints)
    if given < fewest or (most is not None and given > most):
        expected = f"{fewest}" if most == fewest else f"at least {fewest}"
        files = ", ".join(args.checkpoints)
        raise ModeconnError(f"a {kind} goes through {expected} checkpoints, got {given}: {files}")
    if kind == "plane" and args.points == "adaptive":
        raise ModeconnError("--points adaptive is for curves, not for a plane: give a number")
    if kind == "plane" and args.at is not None:
        raise ModeconnError("--at takes points of a curve, not of a plane: use --points")
    options.check_inputs(args.checkpoints)
    return kind


def make_path(kind: str, files: list[str], model: nn.Module | None = None) -> paths.Path:
    """Makes the path through checkpoint files, or reads the file of one, which is of the model."""
    from modeconn.parameters import paths, planes
    from modeconn.parameters.loading import load_path

    if kind == CURVE:
        return load_path(files[0], model=model)
    if kind == "plane":
        return planes.Plane.through(*files)
    if kind == "line":
        return paths.Line(*files)
    return (paths.PolyChain if kind == "polychain" else paths.Bezier)(files)


def points_of(args: argparse.Namespace, kind: str) -> int | str | np.ndarray:
    """Returns the points of --at, or the number or word of --points or its default."""
    import numpy as np

    if args.at is not None:
        return np.array(args.at)
    if isinstance(args.points, str):
        return args.points
    return int(args.points or (POINTS_OF_A_PLANE if kind == "plane" else POINTS))


def run(args: argparse.Namespace) -> None:
    """Checks everything, evaluates, prints and writes."""
    kind = check_path(args)
    check_results(args)
    if args.ensemble and (args.buffers == "recompute" or args.loss != "cross_entropy"):
        raise ModeconnError(
            "--ensemble is for class labels, --loss cross_entropy, and statistics that are those "
            "of checkpoints: expected --buffers interpolate or start"
        )
    spec, model = options.load_model(args, args.checkpoints)
    path = make_path(kind, args.checkpoints, model)
    result = evaluated(args, spec, model, path, points_of(args, kind))
    together = None
    if args.ensemble:
        together = _ensemble(args, model, path, result)
        result.info |= {
            "ensemble_loss": together.loss,
            "ensemble_error": together.error,
            "ensemble_ece": together.ece,
        }
    report(result, args)
    if together is not None and not args.quiet and args.json != "-":
        print(together)


def _ensemble(
    args: argparse.Namespace, model: nn.Module, path: paths.Path, result: PathResult
) -> Ensemble:
    """Evaluates the ensemble of the points of a result."""
    from modeconn.evaluation.predictions import ensemble

    return ensemble(
        model,
        path,
        options.load_data(args),
        result.t,
        buffers=args.buffers,
        backend=args.backend,
        device=args.device,
        batch_size=args.batch_size,
        precision=args.precision,
    )


def check_results(
    args: argparse.Namespace, suffixes: tuple[str, ...] = RESULT_SUFFIXES, **more: str | None
) -> None:
    """Checks the options of `add_results` before anything is computed.

    Args:
        args: the parsed options.
        suffixes: of the file of --save.
        **more: other files to write, by option.
    """
    plot = getattr(args, "plot", None)
    outputs = {"--plot": plot, "--save": args.save, "--csv": args.csv, "--json": args.json, **more}
    options.check_outputs(outputs, args.checkpoints)
    options.check_plot(plot)
    if args.save is not None and not args.save.lower().endswith(suffixes):
        expected = options.listed(suffixes)
        raise ModeconnError(f"--save {args.save}: the name must end in {expected}")


def evaluated(
    args: argparse.Namespace,
    spec: str,
    model: nn.Module,
    path: paths.Path | None,
    points: int | str | np.ndarray,
    resume: bool = True,
    by: Callable[..., Any] | None = None,
) -> Any:
    """Evaluates as the options ask, and notes in the result what was evaluated.

    Where the file of --save is the result of the same command, that is taken.

    Args:
        args: the parsed options.
        spec: of the model.
        model: the model.
        path: the path.
        points: where on it.
        resume: continue an unfinished evaluation beside the file of --save, and keep one there.
        by: what evaluates instead of `mc.evaluate`, with the same arguments.

    Returns:
        A `PathResult`, or what `by` returns.
    """
    from modeconn.evaluation.evaluator import evaluate

    data = options.load_data(args)
    estimated = args.buffers == "recompute" and args.split != "train"
    run_by: Callable[..., Any] = by or evaluate
    alone = resume and not launched.is_shared()
    training = options.load_data(args, "train") if estimated else None
    identity = None
    if args.save is not None and alone and by is None and path is not None:
        sets = [data] if training is None else [data, training]
        identity = finished.identity(args, spec, path, points, sets)
    known = finished.known(args.save, identity)
    if known is not None:
        if not args.quiet and args.json != "-":
            print(f"{args.save} is the result of this command: remove it to compute it anew\n")
        return known
    keeps = args.save is not None and alone and not isinstance(points, str)
    unfinished = f"{args.save}.unfinished" if keeps else None
    with output.kept(unfinished, unfinished):
        result = run_by(
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
            recompute_data=training,
            resume=unfinished,
            ignore=args.ignore,
        )
    result.info |= {
        "model": spec,
        "checkpoints": ", ".join(args.checkpoints),
        "data": f"{args.data} {args.split}",
        "normalization": data.normalization,
        **({} if identity is None else {finished.KEY: identity}),
    }
    return result


def write(result: PathResult | LayerTable, args: argparse.Namespace) -> None:
    """Writes the files of --save, --csv and --json; what was kept of the unfinished one goes."""
    if args.save is not None:
        result.save(args.save)
        with contextlib.suppress(FileNotFoundError):
            Path(f"{args.save}.unfinished").unlink()
    if args.csv is not None:
        result.to_csv(args.csv)
    if args.json is not None:
        output.write_json(result.to_dict(), args.json)


def report(result: PathResult, args: argparse.Namespace, **drawn: str | None) -> None:
    """Writes the files that were asked for, and prints the rest.

    Args:
        result: the result.
        args: the parsed options.
        **drawn: figures that are written already, to be named as well.
    """
    if args.plot is not None:
        output.write_plot(result, args.plot)
    write(result, args)
    if args.quiet or args.json == "-":
        return
    output.print_result(result)
    output.print_written(args.plot, *drawn.values(), args.save, args.csv, args.json)
