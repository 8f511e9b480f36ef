"""What the commands share: the parser, options, and checks made before any long work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from torch import nn

    from modeconn.data.datasets import Images

    Commands = argparse._SubParsersAction["Parser"]

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help keeps the lines of its example."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        print(f"modeconn: error: {message} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def example(command: str, comment: str = "") -> str:
    """The end of a help text."""
    return f"example:\n  {command}" + (f"\n\n{comment}" if comment else "")


def count(text: str) -> int:
    """A whole number of at least one."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def numbers(text: str) -> list[float]:
    """Numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not numbers separated by commas, such as 0,0.25,1"
        ) from None


def names(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    """The option --model."""
    parser.add_argument(
        "--model",
        metavar="SPEC",
        required=required,
        help="mlp:784-245x10-10, vgg11:width=16, resnet20, vit, … or package.module:factory"
        + ("" if required else " (default: what `modeconn train` noted in the first checkpoint)"),
    )


def add_data(parser: argparse.ArgumentParser, split: bool = True) -> None:
    """The options that choose a data set."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", metavar="NAME", required=True, help="digits, mnist, fashion-mnist or cifar10"
    )
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="the folder that holds MNIST/raw, FashionMNIST/raw or cifar-10-batches-bin "
        "(default: $MODECONN_DATA; digits needs none)",
    )
    if split:
        group.add_argument(
            "--split",
            choices=("train", "test"),
            default="train",
            help="which part of the data (default: train)",
        )
    group.add_argument(
        "--limit", metavar="N", type=count, help="only the first N samples (default: all)"
    )
    for name, what in (("mean", "subtracted from"), ("std", "dividing")):
        group.add_argument(
            f"--{name}",
            metavar="NUMBERS",
            type=numbers,
            help=f"{what} the inputs, one number or one per channel (default: the data set's usual ones)",
        )


def load_data(args: argparse.Namespace, split: str | None = None) -> Images:
    """The data set that the options name."""
    from modeconn.data import datasets

    return datasets.load(
        args.data,
        args.data_root,
        split or args.split,
        mean=args.mean,
        std=args.std,
        limit=args.limit,
    )


def load_model(args: argparse.Namespace, files: Iterable[str]) -> tuple[str, nn.Module]:
    """The model of --model, or the built-in one that a checkpoint says it holds; and its spec."""
    from modeconn import models

    spec = args.model
    if spec is None:
        first = next(iter(files))
        spec = checkpoint_metadata(first).get("model", "")
        # A file must not decide which code is imported, so only built-in models are taken from it.
        if not models.is_builtin(spec):
            raise ModeconnError(
                f"--model is missing, and {first} does not say which built-in model it is"
            )
    return spec, models.build(spec)


def checkpoint_metadata(file: str | os.PathLike[str]) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors; empty for other files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as archive:
            return dict(archive.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def check_inputs(files: Iterable[str]) -> None:
    """Raise ModeconnError for a checkpoint that is not there."""
    for file in files:
        if not Path(file).is_file():
            raise ModeconnError(
                f"{file}: {'a folder, not a checkpoint' if Path(file).is_dir() else 'no such file'}"
            )


def check_outputs(outputs: dict[str, str | None], inputs: Iterable[str] = ()) -> None:
    """Raise ModeconnError where a file could not be written later, or would replace an input.

    Args:
        outputs: option name to file; None and ``-`` (stdout) are left out.
        inputs: files that are read.
    """
    taken = {Path(file).resolve(): f"the input {file}" for file in inputs}
    for option, file in outputs.items():
        if file is None or file == "-":
            continue
        path = Path(file)
        if path.is_dir():
            raise ModeconnError(f"{option} {file}: is a folder, expected a file name")
        if not path.parent.is_dir():
            raise ModeconnError(f"{option} {file}: the folder {path.parent} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise ModeconnError(f"{option} {file}: the folder {path.parent} is not writable")
        if path.resolve() in taken:
            raise ModeconnError(f"{option} {file}: would overwrite {taken[path.resolve()]}")
        taken[path.resolve()] = f"the file of {option}"


def check_plot(file: str | None, option: str = "--plot") -> None:
    """Raise ModeconnError where a plot could not be drawn later."""
    if file is None:
        return
    from importlib.util import find_spec

    if Path(file).suffix.lower() not in PLOT_SUFFIXES:
        raise ModeconnError(f"{option} {file}: the name must end in {', '.join(PLOT_SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ModeconnError(
            f"{option} needs matplotlib, which is not installed: pip install 'modeconn[plot]'"
        )
