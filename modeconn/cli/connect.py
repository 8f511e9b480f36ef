"""`modeconn connect`: builds paths of certified loss between two networks or more."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn.cli import compare, options, output
from modeconn.connection.solution import METHODS
from modeconn.errors import ModeconnError
from modeconn.files.writing import remove_folder, sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

    from modeconn.connection.connection import Connection
    from modeconn.connection.star import Star
    from modeconn.training.curves.result import Fit

DESCRIPTION = """\
Build a path of low loss between two networks through subnetworks, and certify its loss on
the training data. Loss and error on the test data along the path are bounded as well.
Three networks or more are connected pairwise through one subnetwork on the input."""
EXAMPLE = "modeconn connect a.safetensors b.safetensors --data digits --target 0.02 --out c/"
RESUME = """\
Then modeconn verify c/ checks the certificate anew. After an interruption the
same command continues from c.partial/."""


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "connect",
        help="build a path between networks with a certified bound on its loss",
        description=DESCRIPTION,
        epilog=options.example(EXAMPLE, RESUME),
    )
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help=f"two networks, or more for a star that connects all pairs: {options.CHECKPOINT}",
    )
    options.add_model(parser, required=False)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="new folder to write")
    options.add_data(parser, split=False)
    _add_construction(parser)
    compare.add(parser)
    options.add_results(parser, "loss and error along the path", "the result")
    parser.set_defaults(run=run)


def _add_construction(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("construction")
    group.add_argument(
        "--target",
        metavar="LOSS",
        type=float,
        help="training loss to stay below (default: about the larger one of the end points)",
    )
    group.add_argument(
        "--kept",
        metavar="FRACTION[,…]",
        type=options.numbers,
        default=[0.5],
        help="fraction of a layer's units that its subnetwork reads, for all hidden layers "
        "or for each (default: 0.5)",
    )
    group.add_argument(
        "--subnetworks",
        metavar="KIND",
        default="auto",
        help=f"{options.listed(METHODS)} (default: auto, which takes readouts and heads for "
        "fully connected ReLU networks and trained ones elsewhere); separable and memorise train "
        "nothing",
    )
    options.add_seed(group, "units, weights and the order of samples")


def run(args: argparse.Namespace) -> None:
    """Checks everything, connects, prints and writes."""
    if len(args.checkpoints) < 2:
        raise ModeconnError("one CHECKPOINT is given: expected two networks or more")
    compare.check(args)
    options.check_inputs(args.checkpoints)
    options.check_outputs({"--plot": args.plot, "--json": args.json}, args.checkpoints)
    options.check_plot(args.plot)
    out = Path(args.out)
    unfinished = out.with_name(f"{out.name}.partial")
    # Both are there after a kill between saving and cleaning up: the search is read once more.
    if out.exists() and not unfinished.exists():
        raise ModeconnError(f"--out {args.out} exists: expected the name of a new folder")
    options.check_seed(args.seed)

    from modeconn.connection.connection import Connection
    from modeconn.connection.pipeline import connect

    spec, model = options.load_model(args, args.checkpoints)
    data, test = (options.load_data(args, split) for split in ("train", "test"))
    quiet = args.quiet or args.json == "-"
    sweep(unfinished)
    began = time.perf_counter()
    with output.kept(f"{unfinished}/search.json", str(unfinished)):
        networks = args.checkpoints if len(args.checkpoints) > 2 else None
        found = connect(
            model,
            networks or args.checkpoints[0],
            None if networks else args.checkpoints[1],
            data,
            args.kept[0] if len(args.kept) == 1 else args.kept,
            args.target,
            test,
            args.subnetworks,
            args.seed,
            spec=spec,
            folder=unfinished,
            log=None if quiet else _say,
        )
    found.save(out)
    remove_folder(unfinished)
    seconds = time.perf_counter() - began
    fit = None if args.compare is None else compare.fitted(args, model, data)
    rows = compare.rows(model, found, seconds, fit) if fit and isinstance(found, Connection) else []
    if args.plot is not None:
        _plot(found, model, data, args.plot, fit)
    if args.json is not None:
        compared = {"compared": [asdict(row) for row in rows]} if rows else {}
        output.write_json(_content(found) | compared, args.json)
    if not quiet:
        print(found)
        _print_table(found)
        compare.print_rows(rows)
        output.print_written(args.out, args.plot, args.json)


def _say(line: str) -> None:
    print(output.shown(line), file=sys.stderr, flush=True)


def _plot(
    found: Connection | Star, model: nn.Module, data: Any, file: str, fit: Fit | None
) -> None:
    """Draws a connection, or a star, with straight lines beside it.

    Two more passes give the curves of a connection's swings and its straight line; a star's lines
    are those between neighbours on the circle.
    """
    from modeconn.connection.connection import Connection
    from modeconn.evaluation.evaluator import evaluate
    from modeconn.parameters.paths import Line

    if isinstance(found, Connection):
        first, last = found.path.control_points[0], found.path.control_points[-1]
        line = evaluate(model, Line(first, last), data, points=25)
        result = found.evaluate(model, data)

        def draw(ax: Axes) -> None:
            found.plot(ax, line=line, result=result)
            if fit is not None:
                compare.draw(ax, fit)

        output.write_figure(draw, file)
        return
    lines = {}
    for pair in zip(found.names, (*found.names[1:], found.names[0])):
        ends = (found.descents[name].path.control_points[0] for name in pair)
        lines[pair] = evaluate(model, Line(*ends), data, points=25)
    output.write_figure(lambda ax: found.plot(ax, lines), file)


def _content(found: Connection | Star) -> dict[str, Any]:
    from modeconn.connection.connection import Connection

    if not isinstance(found, Connection):
        return {**found.to_dict(), "bound": found.bound, "error_bound": found.error_bound}
    test = found.test_certificate
    return {
        "certificate": found.certificate.to_dict(),
        "test_certificate": None if test is None else test.to_dict(),
        "details": found.details,
    }


def _print_table(found: Connection | Star) -> None:
    rows = []
    for record in found.details["found"]:
        # all networks have one subnetwork on the input
        shared = record["entry"] in (0, "input")
        if shared and record["side"] != "a":
            continue
        rows.append(
            [
                f"S_{record['entry']}" + ("" if shared else f" of {record['side']}"),
                record["method"],
                "-".join(map(str, record["widths"])) or "readout",
                f"{record['loss']:.4g}",
                f"{100 * record['error']:.3g} %",
                str(record["epochs"]),
                output.seconds_text(record["seconds"]),
            ]
        )
    output.print_table(["subnetwork", "kind", "widths", "loss", "error", "epochs", "time"], rows)
