"""`modeconn reproduce`: the paper's experiments."""

from __future__ import annotations

import argparse
import sys
import time

from modeconn.cli import options, output


def add(commands: options.Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "reproduce",
        help="the experiments of the paper on connected solutions",
        description="Run an experiment of Nguyen, Bréchet, Mondelli 2021: mnist-fcn, cifar10-fcn, cifar10-vgg11, widths,\n"
        "widths-cifar10 or path. It writes tables (CSV, JSON) and the figure; the same command goes on after an interruption.",
        epilog=options.example("modeconn reproduce mnist-fcn --data-root data/ --out mnist-fcn/"),
    )
    parser.add_argument("experiment", metavar="NAME", help="which experiment")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        required=True,
        help="new, or of the same experiment, which then goes on",
    )
    parser.add_argument(
        "--data-root", metavar="DIR", help="the data set's folder (default: $MODECONN_DATA)"
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
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=1,
        help="of training, draws and subnetworks (default: 1)",
    )
    parser.add_argument("--quiet", "-q", action="store_true", help="print nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run, and print the table."""
    options.check_inputs(args.solution)

    from modeconn.experiments.run import reproduce

    began = time.perf_counter()
    if args.full and not args.quiet:
        _say(_estimated(args))
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
    output.print_table(
        [name.replace("_", " ") for name in lines[0]],
        [[_cell(*item) for item in ln.items()] for ln in lines],
    )
    if "better" in lines[0]:
        worse = [line for line in lines if not line["better"]]
        print(
            f"subnetworks have the smaller training loss at {len(lines) - len(worse)} of {len(lines)} entry layers"
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
    return f"training takes at most about {times or 'minutes'} on this machine; it ends early once no error is left"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _cell(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{100 * value:.2f} %" if name.endswith("error") else f"{value:.4g}"
    return "-" if value is None else str(value)
