"""`modeconn plane`: loss and error on a plane through checkpoints, or around one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from modeconn.cli import evaluate, options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from modeconn.parameters.paths import Plane

POINTS = 25


def add(commands: options.Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "plane",
        help="loss and error on a plane: through three checkpoints, around one, or of a training trajectory",
        description="Loss and error on a plane, in one pass over the data: around one checkpoint along two random\n"
        "directions, through three, or along the principal components of a training's checkpoints.",
        epilog=options.example(
            "modeconn plane a.safetensors b.safetensors c.safetensors --data digits --plot plane.png",
            "Interrupted with --save, the same command goes on where it was.",
        ),
    )
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help="one, three, or with --trajectory three or more",
    )
    options.add_model(parser, required=False)
    which = parser.add_argument_group("plane")
    which.add_argument(
        "--points",
        metavar="N",
        type=options.count,
        default=POINTS,
        help=f"N × N points (default: {POINTS})",
    )
    which.add_argument(
        "--trajectory",
        action="store_true",
        help="the checkpoints are those of a training, in its order",
    )
    which.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of random directions (default: 0)"
    )
    which.add_argument(
        "--norm",
        choices=("filter", "layer", "none"),
        default="filter",
        help="what random directions are scaled by: the norms of the network's filters or layers (default: filter)",
    )
    for axis in ("x", "y"):
        which.add_argument(
            f"--{axis}",
            metavar="LOW,HIGH",
            type=options.numbers,
            help=f"the part of the {axis} axis to look at; write --{axis}=-1,1 where the first is negative",
        )
    options.add_data(parser)
    evaluate.add_computing(parser)
    evaluate.add_results(parser)
    parser.add_argument(
        "--surface", metavar="FILE", help="draw a surface in three dimensions: .png, .svg or .pdf"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check everything, evaluate, print and write."""
    given = len(args.checkpoints)
    if args.trajectory and given < 3:
        raise ModeconnError(
            f"a trajectory needs at least 3 checkpoints, got {given}: {', '.join(args.checkpoints)}"
        )
    if not args.trajectory and given not in (1, 3):
        raise ModeconnError(
            f"a plane goes through 3 checkpoints, or around 1, got {given}: --trajectory takes more"
        )
    options.check_inputs(args.checkpoints)
    evaluate.check_results(args, **{"--surface": args.surface})
    options.check_plot(args.surface, "--surface")
    for axis in ("x", "y"):
        ends = getattr(args, axis)
        if ends is not None and (len(ends) != 2 or not ends[0] < ends[1]):
            raise ModeconnError(
                f"--{axis} is {','.join(map(str, ends))}: expected LOW,HIGH with LOW below HIGH"
            )
    spec, model = options.load_model(args, args.checkpoints)
    result = evaluate.evaluated(args, spec, model, make_plane(args), args.points)
    if args.surface is not None:
        output.write_figure(lambda ax: result.plot(ax, surface=True), args.surface, surface=True)
    evaluate.report(result, args, surface=args.surface)


def make_plane(args: argparse.Namespace) -> Plane:
    """The plane that the options say."""
    from modeconn.parameters.paths import Plane

    if args.trajectory:
        plane = Plane.trajectory(args.checkpoints)
    elif len(args.checkpoints) == 3:
        plane = Plane.through(*args.checkpoints)
    else:
        plane = Plane.random(
            args.checkpoints[0], seed=args.seed, norm=None if args.norm == "none" else args.norm
        )
    x, y = (getattr(args, axis) or plane.extent[i] for i, axis in enumerate(("x", "y")))
    plane.extent = (tuple(x), tuple(y))
    return plane
