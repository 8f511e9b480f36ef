"""`modeconn layerwise`: loss as one layer after another goes from one network to the other."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from modeconn.cli import evaluate, options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from modeconn.evaluation.layer_table import LayerTable

POINTS = 11
# As modeconn.evaluation.layers has them, which costs the import of torch.
MODES = ("single", "cumulative")


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "layerwise",
        help="loss as single layers go from one network to the other, in one pass",
        description="Loss where one layer after another, or all up to each one, is interpolated\n"
        "between two checkpoints: a table layer × t, in one pass over the\ndata.",
        epilog=options.example(
            "modeconn layerwise a.safetensors b.safetensors --data digits --plot layers.png"
        ),
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs=2, help=f"two: {options.CHECKPOINT}"
    )
    options.add_model(parser, required=False)
    parser.add_argument(
        "--points",
        metavar="N",
        type=options.count,
        default=POINTS,
        help=f"points from the first network to the second, for each layer (default: {POINTS})",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help="single: one layer moves; cumulative: all layers up to it (default: single)",
    )
    parser.add_argument(
        "--layers",
        metavar="PATTERNS",
        type=options.names,
        help="prefixes of modules or regular expressions, separated by commas, each of which is a "
        "layer (default: every module that has parameters)",
    )
    options.add_data(parser)
    evaluate.add_computing(parser)
    evaluate.add_results(parser, suffixes=(".json",))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Checks everything, evaluates, prints and writes."""
    if args.points < 2:
        raise ModeconnError("--points 1: expected at least 2, from one network to the other")
    options.check_inputs(args.checkpoints)
    evaluate.check_results(args, suffixes=(".json",))
    spec, model = options.load_model(args, args.checkpoints)

    from modeconn.evaluation.layers import layerwise

    def table(_: Any, __: Any, data: Any, points: int, **given: Any) -> LayerTable:
        a, b = args.checkpoints
        return layerwise(model, a, b, data, points, mode=args.mode, layers=args.layers, **given)

    result = evaluate.evaluated(args, spec, model, None, args.points, by=table)
    metric = next(iter(result.values))
    if args.plot is not None:
        output.write_figure(lambda ax: result.plot(ax, metric), args.plot)
    evaluate.write(result, args)
    if args.quiet or args.json == "-":
        return
    print(result)
    print()
    output.print_effort(result)
    output.print_written(args.plot, args.save, args.csv, args.json)
