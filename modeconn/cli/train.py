"""`modeconn train`: a network trained to zero error, as a checkpoint to evaluate."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from torch import nn

    from modeconn.training.train import Epoch, TrainReport


def add(commands: options.Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "train",
        help="train a network to zero training error",
        description="Train a network by SGD with Nesterov momentum to zero training error.",
        epilog=options.example(
            "modeconn train --model mlp:64-64x3-10 --data digits --seed 1 --out a.safetensors",
            "Ctrl-C keeps the finished epochs; --resume goes on from there, to the same weights.",
        ),
    )
    options.add_model(parser, required=True)
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="the checkpoint to write: .safetensors"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the unfinished training in FILE.training"
    )
    options.add_data(parser, split=False)
    training = parser.add_argument_group("training")
    training.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of the initial weights and the order of samples (default: 0)",
    )
    for name, default, what in (
        ("lr", 0.003, "learning rate"),
        ("momentum", 0.95, "Nesterov momentum"),
        ("weight-decay", 0.0, "weight decay"),
    ):
        training.add_argument(
            f"--{name}",
            metavar="X",
            type=float,
            default=default,
            help=f"{what} (default: {default:g})",
        )
    training.add_argument(
        "--batch-size",
        metavar="N",
        type=options.count,
        default=100,
        help="samples per step (default: 100)",
    )
    training.add_argument(
        "--epochs",
        metavar="N",
        type=options.count,
        default=200,
        help="at most so many (default: 200)",
    )
    training.add_argument(
        "--to-the-end", action="store_true", help="do not stop at zero training error"
    )
    training.add_argument(
        "--device", metavar="NAME", default="cpu", help="cpu, cuda, cuda:1, … (default: cpu)"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write how it went as JSON; - is stdout, and nothing else then is",
    )
    parser.add_argument(
        "--quiet", "-q", action="store_true", help="print nothing, and show no progress"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check everything, train, print and write."""
    if Path(args.out).suffix != ".safetensors":
        raise ModeconnError(f"--out {args.out}: the name must end in .safetensors")
    options.check_outputs({"--out": args.out, "--json": args.json})

    from modeconn.training.train import train

    model = new_model(args.model, args.seed, args.device)
    data, test = (options.load_data(args, split) for split in ("train", "test"))
    quiet = args.quiet or args.json == "-"
    if not quiet:
        print(
            f"{args.model} on {args.data}: {output.counted(len(data), 'training sample')}, seed {args.seed}"
        )
    history: list[Epoch] = []
    with output.epoch_bar(args.epochs, quiet) as show:

        def log(epoch: Epoch) -> None:
            history.append(epoch)
            show(epoch)

        report = train(
            model,
            data,
            test=test,
            lr=args.lr,
            momentum=args.momentum,
            batch_size=args.batch_size,
            epochs=args.epochs,
            seed=args.seed,
            weight_decay=args.weight_decay,
            stop_at_zero_error=not args.to_the_end,
            checkpoint=args.out,
            resume=args.resume,
            metadata={"model": args.model, "data": args.data, "normalization": data.normalization},
            log=log,
        )
    if args.json is not None:
        output.write_json(_content(args, report, history), args.json)
    if not quiet:
        _print(args.out, report)


def new_model(spec: str, seed: int, device: str = "cpu") -> nn.Module:
    """The model with weights drawn from a seed: as He et al. 2015 for built-in ones, else by its factory."""
    import torch

    from modeconn import models

    if not 0 <= seed < 2**63:
        raise ModeconnError(f"seed is {seed}, expected at least 0 and below 2**63")
    torch.manual_seed(seed)
    model = models.build(spec)
    if models.is_builtin(spec):
        models.initialise(model, torch.Generator().manual_seed(seed))
    try:
        return model.to(device)
    # which of the two depends on how PyTorch was built
    except (RuntimeError, AssertionError) as error:
        raise ModeconnError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _content(args: argparse.Namespace, report: TrainReport, history: list[Epoch]) -> dict[str, Any]:
    return {
        "checkpoint": args.out,
        "model": args.model,
        "data": args.data,
        **{
            name: getattr(args, name)
            for name in ("seed", "lr", "momentum", "weight_decay", "batch_size")
        },
        **asdict(report),
        "stopped": str(report.stopped),
        "history": [asdict(epoch) for epoch in history],
    }


def _print(file: str, report: TrainReport) -> None:
    print(
        f"{output.counted(report.epochs, 'epoch')} in {output.seconds_text(report.seconds)}: {report.stopped}"
    )
    print()
    rows = [
        [
            "train",
            output.metric_text("loss", report.loss),
            output.metric_text("error", report.error),
        ]
    ]
    if report.test_error is not None:
        rows.append(
            [
                "test",
                output.metric_text("loss", report.test_loss),
                output.metric_text("error", report.test_error),
            ]
        )
    output.print_table(["", "loss", "error"], rows)
    print()
    output.print_written(file)
