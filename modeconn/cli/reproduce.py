"""`modeconn reproduce`: runs the paper's experiments in small, or with its settings."""

from __future__ import annotations

import argparse
import sys
import time

from modeconn.cli import options, output
from modeconn.errors import ModeconnError
from modeconn.experiments.settings import NAMES

DESCRIPTION = """\
Run an experiment of Nguyen, Bréchet, Mondelli (NeurIPS 2021). It writes tables (CSV, JSON)
and the figure; the same command continues after an interruption."""


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "reproduce",
        help="run an experiment of the paper on connected solutions",
        description=DESCRIPTION,
        epilog=options.example("modeconn reproduce mnist-fcn --data-root data/ --out mnist-fcn/"),
    )
    parser.add_argument("experiment", metavar="NAME", help=options.listed(NAMES))
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        required=True,
        help="new folder, or one of the same experiment, which is continued",
    )
    parser.add_argument(
        "--data-root", metavar="DIR", help="folder of the data set (default: $MODECONN_DATA)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="minutes on two cores (the default)")
    size.add_argument("--full", action="store_true", help="the paper's settings: days on a CPU")
    parser.add_argument(
        "--solution",
        metavar="FILE",
        action="append",
        default=[],
        help="a trained network, again for more; a path has two (default: train)",
    )
    parser.add_argument(
        "--solutions",
        metavar="K",
        type=int,
        help="so many networks, means over them with 95 %% intervals (default: 1, and with --full "
        "as published: 10, 5 for VGG-11, 3 of each width)",
    )
    options.add_seed(parser, "training, draws and subnetworks", default=1)
    options.add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the experiment, and prints its table."""
    options.check_inputs(args.solution)
    if args.solution and args.solutions not in (None, len(args.solution)):
        raise ModeconnError(
            f"--solutions is {args.solutions}, and --solution is given {len(args.solution)} times: "
            "expected the same number, or one of them alone"
        )

    from modeconn.experiments.run import reproduce

    began = time.perf_counter()
    if args.full and not args.quiet:
        _say(_estimated(args))
    with output.kept(f"{args.out}/settings.json", args.out):
        result = reproduce(
            args.experiment,
            args.out,
            args.data_root,
            quick=not args.full,
            solutions=args.solution or args.solutions,
            seed=args.seed,
            log=None if args.quiet else _say,
        )
    if args.quiet:
        return
    lines = result["lines"]
    columns = [name for name in lines[0] if not name.endswith("_interval")]
    header = [name.replace("_", " ") for name in columns]
    output.print_table(header, [_cells(columns, line) for line in lines])
    compared = [line["better"] for line in lines if line.get("better") is not None]
    if compared:
        print(
            f"subnetworks have the smaller training loss at {sum(compared)} of {len(compared)} "
            "entry layers that have dropout networks"
        )
    print(f"{output.seconds_text(time.perf_counter() - began)}; tables and figure in {args.out}")


def _estimated(args: argparse.Namespace) -> str:
    from modeconn.experiments.estimate import estimate

    found = estimate(
        args.experiment,
        args.data_root,
        quick=False,
        solutions=args.solutions,
        given=len(args.solution),
    )
    parts = {"networks": found.solutions, "subnetworks": found.subnetworks}
    times = " and ".join(
        f"{output.seconds_text(seconds)} for the {what}"
        for what, seconds in parts.items()
        if seconds
    )
    return (
        f"training takes at most about {times or 'minutes'} on this machine; "
        "it ends early once no error is left"
    )


def _say(line: str) -> None:
    print(output.shown(line), file=sys.stderr, flush=True)


def _cells(columns: list[str], line: dict[str, object]) -> list[str]:
    return [_cell(name, line) for name in columns]


def _cell(name: str, line: dict[str, object]) -> str:
    value, half = line[name], line.get(f"{name}_interval")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    text = _number(name, value)
    return f"{text} ± {_number(name, half)}" if isinstance(half, float) else text


def _number(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if name.endswith("error") else f"{value:.4g}"
