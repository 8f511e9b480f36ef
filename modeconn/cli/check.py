"""`modeconn check`: whether two checkpoints can be the ends of a path, and how they differ."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from modeconn.cli import options, output

if TYPE_CHECKING:
    from torch import nn

# Exit code where something was found that makes a path something else than it seems.
DIFFERENT = 3
DESCRIPTION = f"""\
Compare two checkpoints before they are the ends of a path: architecture, config entries that
change the forward, tokenizers, quantisation, names, shapes, dtypes, ties, and the distance of each
layer. With --data each end is run as its own model, and as the end of the line.
Ends with exit code {DIFFERENT} where the line would not be what it seems."""


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "check",
        help="whether two checkpoints can be the ends of a path, and how they differ",
        description=DESCRIPTION,
        epilog=options.example("modeconn check a.safetensors b.safetensors"),
    )
    for name in ("a", "b"):
        parser.add_argument(name, metavar=name.upper(), help=options.CHECKPOINT)
    options.add_model(parser, required=False)
    parser.add_argument(
        "--ignore",
        metavar="NAMES",
        type=options.names,
        default=(),
        help="entries of config.json that may differ, separated by commas",
    )
    options.add_data(parser, required=False)
    options.add_batch_size(parser)
    results = parser.add_argument_group("results")
    options.add_json(results, "what was found")
    options.add_quiet(results)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compares, prints and writes; returns the exit code."""
    files = [args.a, args.b]
    options.check_inputs(files)
    options.check_outputs({"--json": args.json}, files)

    from modeconn.evaluation.checking import check

    found = check(
        args.a,
        args.b,
        options.load_data(args) if args.data is not None else None,
        model=_model(args, files),
        ignore=args.ignore,
        batch_size=args.batch_size,
    )
    if args.json is not None:
        output.write_json({"a": args.a, "b": args.b, **found.to_dict()}, args.json)
    if not args.quiet and args.json != "-":
        print(found)
        output.print_written(args.json)
    return 0 if found.passed else DIFFERENT


def _model(args: argparse.Namespace, files: list[str]) -> nn.Module | None:
    """Builds the model where it is named, or where data are to be run."""
    if args.model is None and args.data is None:
        return None
    return options.load_model(args, files)[1]
