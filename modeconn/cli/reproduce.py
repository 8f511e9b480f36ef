"""`modeconn reproduce`: runs the paper's experiments in small, or with its settings."""

from __future__ import annotations

import argparse
import sys
import time

from modeconn.cli import options, output
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
        help="a trained network, twice for path (default: train)",
    )
    options.add_seed(parser, "training, draws and subnetworks", default=1)
    options.add_quiet(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Runs the experiment, and prints its table."""
    options.check_inputs(args.solution)

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
            solutions=args.solution,
            seed=args.seed,
            log=None if args.quiet else _say,
        )
    if args.quiet:
        return
    lines = result["lines"]
    header = [name.replace("_", " ") for name in lines[0]]
    output.print_table(header, [_row(line) for line in lines])
    if "better" in lines[0]:
        better = sum(line["better"] for line in lines)
        print(
            f"subnetworks have the smaller training loss at {better} of {len(lines)} entry layers"
        )
    print(f"{output.seconds_text(time.perf_counter() - began)}; tables and figure in {args.out}")


def _estimated(args: argparse.Namespace) -> str:
    from modeconn.experiments.estimate import estimate

    found = estimate(args.experiment, args.data_root, quick=False, solutions=len(args.solution))
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


def _row(line: dict[str, object]) -> list[str]:
    return [_cell(name, value) for name, value in line.items()]


def _cell(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if name.endswith("error") else f"{value:.4g}"
    return "-" if value is None else str(value)
