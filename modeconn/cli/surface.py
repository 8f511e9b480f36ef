"""`modeconn surface`: a loss surface in HDF5, with the options of Goldstein's plot_surface.py."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from modeconn.cli import options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modeconn.dropin.goldstein import Range

DESCRIPTION = """\
Loss and accuracy around a network, or between networks, in HDF5 files that the plots of
github.com/tomgoldstein/loss-landscape read. Its options are those of its plot_surface.py. What a
file lacks is computed in one pass over the data; what is there stays."""
MODEL_FILES = ("model_file", "model_file2", "model_file3")


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "surface",
        help="a loss surface in HDF5, with the options of Goldstein's plot_surface.py",
        description=DESCRIPTION,
        epilog=options.example(
            "modeconn surface --model_file a.safetensors --data digits --x=-1:1:51 --y=-1:1:51 \\\n"
            "      --xnorm filter --xignore biasbn --ynorm filter --yignore biasbn",
            "The same command continues after an interruption, and computes nothing twice.",
        ),
    )
    options.add_model(parser, required=False)
    _add_networks(parser)
    _add_directions(parser)
    options.add_data(parser)
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--loss_name",
        "-l",
        metavar="NAME",
        default="crossentropy",
        help="crossentropy or mse (default: crossentropy)",
    )
    group.add_argument(
        "--batch_size", metavar="N", type=options.count, help="samples read at a time"
    )
    where = group.add_mutually_exclusive_group()
    options.add_device(where, None)
    where.add_argument(
        "--cuda", "-c", dest="device", action="store_const", const="cuda", help="--device cuda"
    )
    group = parser.add_argument_group("results")
    group.add_argument(
        "--surf_file", metavar="FILE", help="the surface (default: named by its options)"
    )
    options.add_plot(group, "the surface")
    options.add_quiet(group)
    parser.set_defaults(run=run)


def _add_networks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("networks")
    said = (
        "the network at the origin",
        "one at 1 on the x axis, instead of a random direction",
        "one at 1 on the y axis",
    )
    for name, text in zip(MODEL_FILES, said):
        group.add_argument(f"--{name}", metavar="FILE", required=name == MODEL_FILES[0], help=text)


def _add_directions(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("directions")
    group.add_argument(
        "--x",
        metavar="MIN:MAX:N",
        type=axis,
        default=axis("-1:1:51"),
        help="range and number of x; write --x=-1:1:51 (default: -1:1:51)",
    )
    group.add_argument("--y", metavar="MIN:MAX:N", type=axis, help="the same of y (default: no y)")
    group.add_argument(
        "--dir_type",
        metavar="TYPE",
        default="weights",
        help="weights, or states, with batch norms' running statistics (default: weights)",
    )
    for name in ("x", "y"):
        group.add_argument(
            f"--{name}norm",
            metavar="NORM",
            default="",
            help=f"scale {name}'s random direction to the network: filter, layer or weight",
        )
        group.add_argument(
            f"--{name}ignore",
            metavar="WHAT",
            default="",
            help=f"biasbn: {name}'s direction leaves biases and norms alone",
        )
    group.add_argument("--same_dir", action="store_true", help="y has the direction of x")
    group.add_argument(
        "--idx", metavar="N", type=int, default=0, help="number of a repeated experiment"
    )
    group.add_argument("--dir_file", metavar="FILE", help="directions that are there already")
    options.add_seed(group, "random directions", default=123)


def axis(text: str) -> Range:
    """Parses a range, lowest:highest:number."""
    try:
        low, high, number = map(float, text.split(":"))
        if not low < high or number < 2 or number != int(number):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range such as -1:1:51, with at least two points"
        ) from None
    return low, high, int(number)


def run(args: argparse.Namespace) -> None:
    """Checks everything, computes what the surface lacks, prints and writes."""
    import torch

    from modeconn.dropin import goldstein

    networks = [file for name in MODEL_FILES if (file := getattr(args, name)) is not None]
    check(args, networks)
    # as in the original, whose networks take their first weights from the same numbers
    torch.manual_seed(args.seed)
    _, model = options.load_model(args, networks)
    net = _loaded(model, args.model_file)
    dir_file = args.dir_file or name_of_directions(args)
    surf_file = args.surf_file or name_of_surface(args, dir_file)
    goldstein.check_surface(surf_file, args.x, args.y)
    if not Path(dir_file).exists():
        if not args.quiet:
            print(f"directions: {dir_file}")
        goldstein.write_directions(dir_file, _directions(args, net))
    unfinished = f"{surf_file}.unfinished"
    with output.kept(unfinished, unfinished):
        result = goldstein.surface(
            net,
            options.load_data(args),
            surf_file,
            dir_file,
            args.x,
            args.y,
            dir_type=args.dir_type,
            split=args.split,
            loss_name=args.loss_name,
            batch_size=args.batch_size,
            device=args.device,
            progress=output.on_terminal() and not args.quiet,
        )
    if args.plot is not None:
        output.write_plot(result, args.plot)
    if not args.quiet:
        output.print_plot(result)
        output.print_written(surf_file, args.plot)


def check(args: argparse.Namespace, networks: list[str]) -> None:
    """Checks the options before anything is computed."""
    from modeconn.dropin import goldstein, surface_file

    surface_file.hdf5()
    options.check_inputs([*networks, *([args.dir_file] if args.dir_file else [])])
    options.check_outputs({"--plot": args.plot}, networks)
    options.check_plot(args.plot)
    allowed = {
        "dir_type": goldstein.DIR_TYPES,
        "loss_name": goldstein.LOSSES,
        **dict.fromkeys(("xnorm", "ynorm"), goldstein.NORMS),
        **dict.fromkeys(("xignore", "yignore"), goldstein.IGNORES),
    }
    for name, values in allowed.items():
        if getattr(args, name) not in values:
            expected = options.listed([value for value in values if value])
            raise ModeconnError(f"--{name} {getattr(args, name)}: expected {expected}")
    if args.y is None and (args.model_file3 or args.same_dir):
        raise ModeconnError("--model_file3 and --same_dir are for a second axis: --y is missing")
    surf_file = args.surf_file or "."
    folder = Path(surf_file).parent if args.surf_file else Path(args.model_file).parent
    if not folder.is_dir():
        raise ModeconnError(f"--surf_file {surf_file}: the folder {folder} does not exist")


def _loaded(model: nn.Module, file: str) -> nn.Module:
    """Return the model with the weights of a file, which are to fit it."""
    from modeconn.parameters import state

    given = state.load(file)
    state.match([model.state_dict(), given], ["the model", file], dtypes=False)
    model.load_state_dict(given)
    return model.eval()


def _directions(args: argparse.Namespace, net: nn.Module) -> list[list[Tensor]]:
    """Make the directions, to other networks or random ones, in the original's order of draws."""
    import copy

    from modeconn.dropin import goldstein

    made: list[list[Tensor]] = []
    for name, other in (("x", args.model_file2), ("y", args.model_file3)):
        if name == "y" and args.y is None:
            continue
        if name == "y" and args.same_dir:
            made.append(made[0])
        elif other is not None:
            target = _loaded(copy.deepcopy(net), other)
            made.append(goldstein.create_target_direction(net, target, args.dir_type))
        else:
            ignore, norm = getattr(args, f"{name}ignore"), getattr(args, f"{name}norm")
            made.append(goldstein.create_random_direction(net, args.dir_type, ignore, norm))
    return made


def name_of_directions(args: argparse.Namespace) -> str:
    """Return the original's name for a file of directions with these options."""
    first, second, third = (getattr(args, name) for name in MODEL_FILES)
    name: str = first
    folder, file = _split(first)
    if second and _split(second)[0] == folder:
        name += f"_{_split(second)[1]}"
    elif second:
        shared = _split(os.path.commonpath([first, second]) + "/")[0]
        inside = _split(second)[0].removeprefix(shared).strip("/")
        name = f"{folder}_{file}_{inside}_{_split(second)[1]}"
    name += f"_{args.dir_type}" + "".join(_noted(args, "x"))
    if args.y is not None:
        if third and _split(third)[0] == folder:
            name += f"_{_split(third)[1]}"
        elif third:
            name += "_".join(_split(third))
        else:
            name += "".join(_noted(args, "y")) + ("_same_dir" if args.same_dir else "")
    return name + (f"_idx={args.idx}" if args.idx > 0 else "") + ".h5"


def _split(file: str) -> tuple[str, str]:
    folder, _, name = file.rpartition("/")
    return folder, name


def _noted(args: argparse.Namespace, name: str) -> list[str]:
    given = {key: getattr(args, key) for key in (f"{name}ignore", f"{name}norm")}
    return [f"_{key}={value}" for key, value in given.items() if value]


def name_of_surface(args: argparse.Namespace, dir_file: str) -> str:
    """Return the original's name for a surface with these options."""
    ranges = [",".join(map(str, each)) for each in (args.x, args.y) if each is not None]
    return dir_file + "_" + "x".join(f"[{each}]" for each in ranges) + ".h5"
