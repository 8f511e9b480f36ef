"""`modeconn train`: trains a network to zero error, as a checkpoint to evaluate."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from torch import nn

    from modeconn.training.loop import Epoch
    from modeconn.training.train import TrainReport


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "train",
        help="train a network to zero training error",
        description="Train a network by SGD with Nesterov momentum to zero training error.",
        epilog=options.example(
            "modeconn train --model mlp:64-64x3-10 --data digits --seed 1 --out a.safetensors",
            "Ctrl-C keeps the finished epochs; --resume continues from there, to the same weights.",
        ),
    )
    options.add_model(parser, required=True)
    parser.add_argument(
        "--out", metavar="FILE", required=True, help="checkpoint to write: .safetensors"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the unfinished training in FILE.training"
    )
    options.add_data(parser, split=False)
    _add_training(parser)
    options.add_json(parser, "losses, errors and times of the epochs")
    options.add_quiet(parser)
    parser.set_defaults(run=run)


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    options.add_seed(group, "the initial weights and the order of samples")
    options.add_number(group, "--lr", "learning rate", 0.003)
    options.add_number(group, "--momentum", "Nesterov momentum", 0.95)
    options.add_number(group, "--weight-decay", "weight decay", 0.0)
    options.add_count(group, "--batch-size", "samples per step", 100)
    options.add_count(group, "--epochs", "largest number of epochs", 200)
    group.add_argument(
        "--to-the-end", action="store_true", help="do not stop at zero training error"
    )
    options.add_device(group)


def run(args: argparse.Namespace) -> None:
    """Checks everything, trains, prints and writes."""
    options.check_checkpoint_name(args.out)
    options.check_outputs({"--out": args.out, "--json": args.json})

    from modeconn.training.train import train

    model = new_model(args.model, args.seed, args.device)
    data, test = (options.load_data(args, split) for split in ("train", "test"))
    quiet = args.quiet or args.json == "-"
    if not quiet:
        samples = output.counted(len(data), "training sample")
        print(f"{args.model} on {args.data}: {samples}, seed {args.seed}")
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
    """Builds a model with weights drawn from a seed.

    The weights of built-in models are drawn as in He et al. 2015; a factory draws its own.
    """
    import torch

    from modeconn import models

    if not 0 <= seed < 2**63:
        raise ModeconnError(f"seed is {seed}: expected at least 0 and below 2**63")
    torch.manual_seed(seed)
    model = models.build(spec)
    if models.is_builtin(spec):
        models.initialise(model, torch.Generator().manual_seed(seed))
    return options.on_device(model, device)


def _content(args: argparse.Namespace, report: TrainReport, history: list[Epoch]) -> dict[str, Any]:
    settings = ("seed", "lr", "momentum", "weight_decay", "batch_size")
    return {
        "checkpoint": args.out,
        "model": args.model,
        "data": args.data,
        **{name: getattr(args, name) for name in settings},
        **asdict(report),
        "stopped": str(report.stopped),
        "history": [asdict(epoch) for epoch in history],
    }


def _print(file: str, report: TrainReport) -> None:
    epochs, taken = output.counted(report.epochs, "epoch"), output.seconds_text(report.seconds)
    print(f"{epochs} in {taken}: {report.stopped}\n")
    measured: dict[str, tuple[float | None, float]] = {"train": (report.loss, report.error)}
    if report.test_error is not None:
        measured["test"] = (report.test_loss, report.test_error)
    rows = []
    for split, (loss, error) in measured.items():
        rows.append([split, output.metric_text("loss", loss), output.metric_text("error", error)])
    output.print_table(["", "loss", "error"], rows)
    print()
    output.print_written(file)
