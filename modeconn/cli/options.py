"""Parts shared by the commands: parser, common options, and checks made before any long work."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from modeconn.cli.output import shown
from modeconn.data import datasets
from modeconn.errors import ModeconnError, SystemFailure
from modeconn.files.writing import is_special, locked, sweep
from modeconn.parameters.folders import is_checkpoint
from modeconn.parameters.reading import text_beside

if TYPE_CHECKING:
    from torch import nn

    Commands = argparse._SubParsersAction["Parser"]

# The output files of the command that runs: locks, and what was there before.
_HELD = contextlib.ExitStack()
_BEFORE: dict[str, tuple[int, int] | None] = {}
PLOT_SUFFIXES = (".png", ".svg", ".pdf")
CHECKPOINT = ".safetensors, a .pt that holds weights only, or a folder of save_pretrained"


class Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line, and whose help keeps the lines of its example."""

    def __init__(self, **options: Any) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        text = f"modeconn: error: {message} (see {self.prog} --help)"
        print(shown(text.replace("\n", " ")), file=sys.stderr)
        raise SystemExit(2)


def example(command: str, comment: str = "") -> str:
    """Returns the end of a help text: a command to copy, and a comment."""
    return f"example:\n  {command}" + (f"\n\n{comment}" if comment else "")


def listed(values: Iterable[str], last: str = "or") -> str:
    """Joins names as a sentence does: ``a, b or c``."""
    *others, final = values
    return f"{', '.join(others)} {last} {final}" if others else final


# ----------------------------------------------------------------------------------------
# types of arguments


def count(text: str) -> int:
    """Parses a whole number of at least one."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def points(text: str) -> int | str:
    """Parses a number of points, or the word for as few as find the maximum."""
    return text if text == "adaptive" else count(text)


def numbers(text: str) -> list[float]:
    """Parses numbers separated by commas."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not numbers separated by commas, such as 0,0.25,1"
        ) from None


def names(text: str) -> tuple[str, ...]:
    """Parses names separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


# ----------------------------------------------------------------------------------------
# options that several commands have


def add_model(parser: argparse.ArgumentParser, required: bool) -> None:
    """Declares --model."""
    default = "" if required else " (default: the one noted in the first checkpoint)"
    parser.add_argument(
        "--model",
        metavar="SPEC",
        required=required,
        help="mlp:784-245x10-10, vgg11:width=16, resnet20, vit, …, hf:FOLDER (built from its "
        "config.json) or package.module:factory" + default,
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="with hf:FOLDER, run the code in FOLDER that its config.json names",
    )


def add_data(
    parser: argparse.ArgumentParser, split: bool = True, required: bool = True
) -> None:
    """Declares the options that choose a data set."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="NAME", required=required, help=listed(datasets.SOURCES))
    group.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder with MNIST/raw, FashionMNIST/raw or cifar-10-batches-bin "
        "(default: $MODECONN_DATA; digits needs none)",
    )
    if split:
        group.add_argument(
            "--split",
            choices=("train", "test"),
            default="train",
            help="part of the data (default: train)",
        )
    group.add_argument(
        "--limit", metavar="N", type=count, help="only the first N samples (default: all)"
    )
    for name, role in (("mean", "subtracted from"), ("std", "dividing")):
        group.add_argument(
            f"--{name}",
            metavar="NUMBERS",
            type=numbers,
            help=f"{role} the inputs: one number, or one per channel "
            "(default: the usual ones of the data set)",
        )


def add_seed(group: argparse._ActionsContainer, decides: str, default: int = 0) -> None:
    """Declares --seed."""
    group.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=default,
        help=f"seed of {decides} (default: {default})",
    )


def check_seed(seed: int) -> None:
    """Raises ModeconnError for a --seed that generators do not take."""
    if not 0 <= seed < 2**31:
        raise ModeconnError(f"--seed is {seed}: expected at least 0 and below 2**31")


def add_count(group: argparse._ActionsContainer, name: str, meaning: str, default: int) -> None:
    """Declares an option that is a whole number of at least one."""
    text = f"{meaning} (default: {default})"
    group.add_argument(name, metavar="N", type=count, default=default, help=text)


def add_number(group: argparse._ActionsContainer, name: str, meaning: str, default: float) -> None:
    """Declares an option that is a number."""
    text = f"{meaning} (default: {default:g})"
    group.add_argument(name, metavar="X", type=float, default=default, help=text)


def add_device(group: argparse._ActionsContainer, default: str | None = "cpu") -> None:
    """Declares --device; None leaves it to what is called, where it is the CPU as well."""
    text = "cpu, cuda, cuda:1, … (default: cpu)"
    group.add_argument("--device", metavar="NAME", default=default, help=text)


def add_batch_size(group: argparse._ActionsContainer) -> None:
    """Declares --batch-size of an evaluation."""
    group.add_argument(
        "--batch-size",
        metavar="N",
        type=count,
        help="samples read at a time (default: chosen for the model)",
    )


def add_plot(group: argparse._ActionsContainer, drawn: str) -> None:
    """Declares --plot."""
    group.add_argument("--plot", metavar="FILE", help=f"draw {drawn}: {listed(PLOT_SUFFIXES)}")


def add_csv(group: argparse._ActionsContainer) -> None:
    """Declares --csv."""
    group.add_argument("--csv", metavar="FILE", help="write t and the metrics as a table of text")


def add_json(group: argparse._ActionsContainer, content: str) -> None:
    """Declares --json."""
    group.add_argument(
        "--json",
        metavar="FILE",
        help=f"write {content} as JSON; - writes to stdout, and nothing else there",
    )


def add_quiet(group: argparse._ActionsContainer) -> None:
    """Declares --quiet."""
    group.add_argument("--quiet", "-q", action="store_true", help="print nothing, show no progress")


def add_results(parser: argparse.ArgumentParser, drawn: str, content: str) -> None:
    """Declares --plot, --json and --quiet, as a group of their own."""
    group = parser.add_argument_group("results")
    add_plot(group, drawn)
    add_json(group, content)
    add_quiet(group)


# ----------------------------------------------------------------------------------------
# loading what they name


def load_data(args: argparse.Namespace, split: str | None = None) -> datasets.Images:
    """Loads the data set that the options name.

    Args:
        args: the parsed options of `add_data`.
        split: "train" or "test"; that of the options if None.
    """
    return datasets.load(
        args.data,
        args.data_root,
        split or args.split,
        mean=args.mean,
        std=args.std,
        limit=args.limit,
    )


def load_model(args: argparse.Namespace, files: Iterable[str]) -> tuple[str, nn.Module]:
    """Builds the model of --model, or the built-in one that the first checkpoint names.

    Returns:
        The spec and the model.
    """
    from modeconn import models

    spec = args.model
    if spec is None:
        first = next(iter(files))
        spec = text_beside(first).get("model", "")
        if (Path(first) / "config.json").is_file():
            spec = f"hf:{first}"  # a class of transformers, whose code is no more the file's own
        # A file must not decide which code is imported, so only built-in models are taken from it.
        elif not models.is_builtin(spec):
            raise ModeconnError(
                f"--model is missing, and {first} does not say which built-in model it is"
            )
    if models.is_builtin(spec):
        _check_shapes(spec, files)
    return spec, models.build(spec, getattr(args, "trust_remote_code", False))


def on_device(model: nn.Module, device: str) -> nn.Module:
    """Moves a model to the device of --device."""
    try:
        return model.to(device)
    # which of the two depends on how PyTorch was built
    except (RuntimeError, AssertionError) as error:
        raise ModeconnError(f"--device {device}: {str(error).splitlines()[0]}") from error


def _check_shapes(spec: str, files: Iterable[str]) -> None:
    """Raises ModeconnError where safetensors files do not fit a model, before it is built.

    A small file may name a model of gigabytes. Only headers are read, and nothing is allocated.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from modeconn import models
    from modeconn.parameters.path_files import metadata_of

    with torch.device("meta"):
        expected = {name: list(t.shape) for name, t in models.build(spec).state_dict().items()}
    for file in files:
        try:
            with safe_open(file, framework="pt") as archive:
                found = {name: archive.get_slice(name).get_shape() for name in archive.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError, ValueError):
            continue  # of another format, or damaged: reading it says so
        if metadata_of(file):  # a curve: of its control points, which are alike, the first counts
            found = {name[2:]: size for name, size in found.items() if name.startswith("0/")}
        found = {
            name.removeprefix("module.").removeprefix("_orig_mod."): size
            for name, size in found.items()
        }
        if found and not found.keys() & expected.keys():
            raise ModeconnError(f"{file} does not fit {spec}: it has none of its tensors")
        for name, shape in expected.items():
            if found.get(name, shape) != shape:
                raise ModeconnError(
                    f"{file} does not fit {spec}: {name!r} is {found[name]}, expected {shape}"
                )


# ----------------------------------------------------------------------------------------
# checks


def check_inputs(files: Iterable[str]) -> None:
    """Raises ModeconnError for a checkpoint that does not exist; reading it says what is amiss."""
    for file in files:
        if Path(file).is_dir() and not is_checkpoint(Path(file)):
            raise ModeconnError(f"{file}: a folder, not a checkpoint")
        if not Path(file).exists():
            raise ModeconnError(f"{file}: no such file")


def check_outputs(outputs: dict[str, str | None], inputs: Iterable[str] = ()) -> None:
    """Raises ModeconnError where a file could not be written later, or would replace an input.

    The files are this command's alone until `release_outputs`; what killed ones left beside them is
    removed.

    Args:
        outputs: option name to file; None and ``-`` (stdout) are left out.
        inputs: files that are read.
    """
    taken = {Path(file).resolve(): f"the input {file}" for file in inputs}
    for option, file in outputs.items():
        if file is None or file == "-":
            continue
        path = Path(file)
        try:
            place = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise ModeconnError(f"{option} {file}: cannot be a file name: {error}") from error
        if path.is_dir():
            raise ModeconnError(f"{option} {file}: is a folder, expected a file name")
        if place in taken:
            raise ModeconnError(f"{option} {file}: would overwrite {taken[place]}")
        taken[place] = f"the file of {option}"
        if is_special(path):  # written into, not replaced
            continue
        if not path.parent.is_dir():
            raise ModeconnError(f"{option} {file}: the folder {path.parent} does not exist")
        if not os.access(path.parent, os.W_OK):
            raise SystemFailure(f"{option} {file}: the folder {path.parent} is not writable")
        _HELD.enter_context(locked(file))
        _BEFORE[file] = _version(path)
        sweep(path)
        sweep(path.with_name(f"{path.name}.unfinished"))


def release_outputs() -> None:
    """Ends what `check_outputs` began."""
    _HELD.close()
    _BEFORE.clear()


def written_outputs() -> list[str]:
    """Lists the output files that were written since `check_outputs`."""
    return [file for file, before in _BEFORE.items() if _version(Path(file)) not in (before, None)]


def _version(file: Path) -> tuple[int, int] | None:
    """Returns what tells a file from the one that replaces it; None if there is none."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def check_checkpoint_name(file: str | None, option: str = "--out") -> None:
    """Raises ModeconnError where a checkpoint to write is not named as one."""
    if file is not None and Path(file).suffix != ".safetensors":
        raise ModeconnError(f"{option} {file}: the name must end in .safetensors")


def check_plot(file: str | None, option: str = "--plot") -> None:
    """Raises ModeconnError where a plot could not be drawn later."""
    if file is None:
        return
    from importlib.util import find_spec

    if Path(file).suffix.lower() not in PLOT_SUFFIXES:
        raise ModeconnError(f"{option} {file}: the name must end in {', '.join(PLOT_SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ModeconnError(
            f"{option} needs matplotlib, which is not installed: pip install 'modeconn[plot]'"
        )
