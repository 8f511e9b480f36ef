"""`modeconn curve`: trains a curve of low loss between two networks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output
from modeconn.training.curves.drawing import DRAWS
from modeconn.training.curves.settings import KINDS

if TYPE_CHECKING:
    from modeconn.training.curves.result import Fit

DESCRIPTION = """\
Train a curve of low loss between two networks by Adam (Garipov et al. 2018), the second one's
units permuted to match the first one's. The loss along it is measured, not proved: for a proof,
see modeconn connect."""
EXAMPLE = "modeconn curve a.safetensors b.safetensors --data digits --steps 200 --out c.safetensors"
AFTER = """\
Then modeconn evaluate c.safetensors --data digits --points adaptive. Ctrl-C keeps the steps that
are done in c.safetensors.training; --resume continues from there, to the same curve."""


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "curve",
        help="train a curve of low loss between two networks",
        description=DESCRIPTION,
        epilog=options.example(EXAMPLE, AFTER),
    )
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs=2, help=options.CHECKPOINT)
    options.add_model(parser, required=False)
    parser.add_argument("--out", metavar="FILE", required=True, help="curve to write: .safetensors")
    parser.add_argument(
        "--resume", action="store_true", help="continue the unfinished fit in FILE.training"
    )
    options.add_data(parser, split=False)
    _add_fit(parser)
    options.add_results(parser, "loss and error along the curve", "the result")
    parser.set_defaults(run=run)


def _add_fit(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fit")
    length = group.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", metavar="N", type=options.count, help="number of steps; or")
    length.add_argument(
        "--epochs", metavar="N", type=options.count, help="number of times over the training data"
    )
    group.add_argument(
        "--kind", choices=KINDS, default=KINDS[0], help=f"of curve (default: {KINDS[0]})"
    )
    options.add_count(group, "--bends", "control points between the networks", 1)
    group.add_argument(
        "--no-align", action="store_true", help="leave the second network's units in their order"
    )
    group.add_argument(
        "--t",
        choices=DRAWS,
        default=DRAWS[0],
        help="how a step's t is drawn: more often where the loss is high, or evenly "
        f"(default: {DRAWS[0]})",
    )
    options.add_number(group, "--lr", "learning rate", 1e-3)
    options.add_number(group, "--weight-decay", "weight decay of the network at t", 0.0)
    options.add_count(group, "--batch-size", "samples per step", 128)
    group.add_argument(
        "--points",
        metavar="N",
        type=options.points,
        default="adaptive",
        help="points to evaluate the curve at: a number, or adaptive (default: adaptive)",
    )
    options.add_seed(group, "t and the order of samples")
    options.add_device(group)


def run(args: argparse.Namespace) -> None:
    """Checks everything, trains, prints and writes."""
    options.check_inputs(args.checkpoints)
    options.check_checkpoint_name(args.out)
    options.check_outputs(
        {"--out": args.out, "--plot": args.plot, "--json": args.json}, args.checkpoints
    )
    options.check_plot(args.plot)
    options.check_seed(args.seed)

    from modeconn.training.curves.fit import fit_curve

    spec, model = options.load_model(args, args.checkpoints)
    model = options.on_device(model, args.device)
    data, test = (options.load_data(args, split) for split in ("train", "test"))
    quiet = args.quiet or args.json == "-"
    fit = fit_curve(
        model,
        args.checkpoints[0],
        args.checkpoints[1],
        data,
        kind=args.kind,
        bends=args.bends,
        align=not args.no_align,
        steps=args.steps,
        epochs=args.epochs,
        lr=args.lr,
        batch_size=args.batch_size,
        t=args.t,
        weight_decay=args.weight_decay,
        seed=args.seed,
        test=test,
        points=args.points,
        checkpoint=args.out,
        resume=args.resume,
        metadata={"model": spec, "data": args.data, "normalization": data.normalization},
        progress=output.on_terminal() and not quiet,
    )
    if args.plot is not None:
        output.write_plot(fit.result, args.plot)
    if args.json is not None:
        output.write_json(_content(args, fit), args.json)
    if not quiet:
        _print(args, fit)


def _content(args: argparse.Namespace, fit: Fit) -> dict[str, Any]:
    return {
        "curve": args.out,
        "checkpoints": args.checkpoints,
        **fit.about,
        "aligned": fit.alignment is not None,
        "seconds": fit.seconds,
        "history": fit.history,
        "train": fit.result.to_dict(),
        "test": None if fit.test is None else fit.test.to_dict(),
    }


def _print(args: argparse.Namespace, fit: Fit) -> None:
    output.print_plot(fit.result)
    print(f"\n{fit.stopped} in {output.seconds_text(fit.seconds)}\n")
    output.print_curve(fit.result, "train")
    if fit.test is not None:
        print()
        output.print_curve(fit.test, "test")
    print(f"\nhighest: {fit.result.info.get('rule', f'of {len(fit.result.t)} points')}")
    if fit.alignment is not None:
        print(f"{args.checkpoints[1]} is permuted: the curve ends at the same function")
    output.print_written(args.out, args.plot, args.json)
