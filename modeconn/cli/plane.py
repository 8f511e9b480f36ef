"""`modeconn plane`: loss and error on a plane through checkpoints, or around one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from modeconn.cli import evaluate, options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from torch import nn

    from modeconn.parameters.planes import Plane

POINTS = 25
DESCRIPTION = """\
Loss and error on a plane, in one pass over the data: around one checkpoint along two random
directions, through three, or along the principal components of a training's checkpoints."""


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "plane",
        help="loss and error on a plane through three checkpoints, around one, or of a training",
        description=DESCRIPTION,
        epilog=options.example(
            "modeconn plane a.safetensors b.safetensors c.safetensors --data digits --plot p.png",
            "With --save, the same command continues after an interruption.",
        ),
    )
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help="one, three, or with --trajectory three or more",
    )
    options.add_model(parser, required=False)
    _add_plane(parser)
    options.add_data(parser)
    evaluate.add_computing(parser)
    evaluate.add_results(parser)
    surfaces = options.listed(options.PLOT_SUFFIXES)
    parser.add_argument(
        "--surface", metavar="FILE", help=f"draw a surface in three dimensions: {surfaces}"
    )
    parser.set_defaults(run=run)


def _add_plane(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("plane")
    group.add_argument(
        "--points",
        metavar="N",
        type=options.count,
        default=POINTS,
        help=f"N × N points (default: {POINTS})",
    )
    group.add_argument(
        "--trajectory",
        action="store_true",
        help="the checkpoints are those of a training, in its order",
    )
    options.add_seed(group, "random directions")
    group.add_argument(
        "--norm",
        choices=("filter", "layer", "none"),
        default="filter",
        help="norms of the network that random directions are scaled to: those of its filters or "
        "layers (default: filter)",
    )
    for axis in ("x", "y"):
        group.add_argument(
            f"--{axis}",
            metavar="LOW,HIGH",
            type=options.numbers,
            help=f"range of the {axis} axis; write --{axis}=-1,1 where the first is negative",
        )


def run(args: argparse.Namespace) -> None:
    """Checks everything, evaluates, prints and writes."""
    check(args)
    spec, model = options.load_model(args, args.checkpoints)
    result = evaluate.evaluated(args, spec, model, make_plane(args, model), args.points)
    if args.surface is not None:
        output.write_figure(lambda ax: result.plot(ax, surface=True), args.surface, surface=True)
    evaluate.report(result, args, surface=args.surface)


def check(args: argparse.Namespace) -> None:
    """Checks the options before anything is computed."""
    given = len(args.checkpoints)
    if args.trajectory and given < 3:
        files = ", ".join(args.checkpoints)
        raise ModeconnError(f"a trajectory needs at least 3 checkpoints, got {given}: {files}")
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
            text = ",".join(map(str, ends))
            raise ModeconnError(f"--{axis} is {text}: expected LOW,HIGH with LOW below HIGH")


def make_plane(args: argparse.Namespace, model: nn.Module) -> Plane:
    """Makes the plane that the options describe."""
    from modeconn.parameters.planes import Plane

    if args.trajectory:
        plane = Plane.trajectory(args.checkpoints)
    elif len(args.checkpoints) == 3:
        plane = Plane.through(*args.checkpoints)
    else:
        norm = None if args.norm == "none" else args.norm
        plane = Plane.random(args.checkpoints[0], seed=args.seed, norm=norm, module=model)
    x, y = plane.extent
    plane.extent = (tuple(args.x or x), tuple(args.y or y))
    return plane
