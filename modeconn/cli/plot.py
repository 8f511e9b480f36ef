"""`modeconn plot`: draws a saved result again, and writes its numbers as a table."""

from __future__ import annotations

import argparse

from modeconn.cli import options, output
from modeconn.cli.evaluate import RESULT_SUFFIXES


def add(commands: options.Commands) -> None:
    """Declares the command."""
    summary = "Draw the result that a command has saved, and write its numbers as a table"
    parser = commands.add_parser(
        "plot",
        help=summary[0].lower() + summary[1:],
        description=f"{summary}.",
        epilog=options.example("modeconn plot plane.npz --plot plane.png --csv plane.csv"),
    )
    parser.add_argument(
        "result", metavar="RESULT", help=f"a file of --save: {options.listed(RESULT_SUFFIXES)}"
    )
    parser.add_argument(
        "--metric", metavar="NAME", help="what to draw (default: the loss, or the first metric)"
    )
    group = parser.add_argument_group("results")
    options.add_plot(group, "the result")
    surfaces = options.listed(options.PLOT_SUFFIXES)
    group.add_argument(
        "--surface", metavar="FILE", help=f"draw a surface in three dimensions: {surfaces}"
    )
    options.add_csv(group)
    options.add_json(group, "the result")
    options.add_quiet(group)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Reads the result, draws, writes and prints."""
    outputs = {
        "--plot": args.plot,
        "--surface": args.surface,
        "--csv": args.csv,
        "--json": args.json,
    }
    options.check_outputs(outputs, [args.result])
    options.check_plot(args.plot)
    options.check_plot(args.surface, "--surface")

    from modeconn.evaluation.result import PathResult

    result = PathResult.load(args.result)
    metric = args.metric or output.main_metric(result)
    result.metric(metric)
    if args.plot is not None:
        output.write_plot(result, args.plot, metric)
    if args.surface is not None:
        output.write_figure(
            lambda ax: result.plot(ax, metric, surface=True), args.surface, surface=True
        )
    if args.csv is not None:
        result.to_csv(args.csv)
    if args.json is not None:
        output.write_json(result.to_dict(), args.json)
    if not args.quiet and args.json != "-":
        output.print_result(result, metric)
        output.print_written(*outputs.values())
