"""`modeconn explain`: shows what an evaluation would compute, and why."""

from __future__ import annotations

import argparse

from modeconn.cli import options, output
from modeconn.cli.evaluate import add_path, check_path, make_path, points_of
from modeconn.errors import ModeconnError

# Rows that the model is captured with; the plan does not depend on their number.
ROWS = 8


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "explain",
        help="show what is computed once and what at every point, without computing it",
        description="Show the plan of an evaluation: what is computed once, what at every point.",
        epilog=options.example("modeconn explain a.safetensors b.safetensors --data digits"),
    )
    add_path(parser)
    options.add_data(parser)
    options.add_json(parser, "the plan")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Checks everything, plans, prints."""
    kind = check_path(args)
    if args.points == "adaptive":
        raise ModeconnError("--points adaptive: a plan is for points that are given: a number")
    options.check_outputs({"--json": args.json}, args.checkpoints)

    from modeconn.evaluation.evaluator import explain

    _, model = options.load_model(args, args.checkpoints)
    path = make_path(kind, args.checkpoints, model)
    data = options.load_data(args)
    sample, _ = data.slice(0, min(ROWS, len(data)))
    plan = explain(model, path, sample, points=points_of(args, kind))
    if args.json is not None:
        output.write_json(plan.to_json(), args.json)
    if args.json != "-":
        print(plan)
