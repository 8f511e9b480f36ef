"""`modeconn connect`: a path of certified loss between two networks."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from torch import nn

    from modeconn.connection.connection import Connection


def add(commands: options.Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "connect",
        help="a path between two networks with a certified bound on its loss",
        description="Build the path of low loss between two networks by subnetworks, and certify its loss on the training\n"
        "data. The loss and error of test data along the same path are bounded as well.",
        epilog=options.example(
            "modeconn connect a.safetensors b.safetensors --data digits --target 0.01 --out connection/",
            "Then modeconn verify connection/ checks the certificate anew. After an interruption the same command goes on\n"
            "from what is in connection.partial/.",
        ),
    )
    parser.add_argument(
        "checkpoints", metavar="CHECKPOINT", nargs=2, help="the two networks: .safetensors or .pt"
    )
    options.add_model(parser, required=False)
    parser.add_argument(
        "--out", metavar="FOLDER", required=True, help="the connection to write: a new folder"
    )
    options.add_data(parser, split=False)
    making = parser.add_argument_group("construction")
    making.add_argument(
        "--target",
        metavar="LOSS",
        type=float,
        help="training loss to get below (default: twice that of the end points)",
    )
    making.add_argument(
        "--kept",
        metavar="FRACTION[,…]",
        type=options.numbers,
        default=[0.5],
        help="part of a layer's units that its subnetwork reads, for all hidden layers or for each (default: 0.5)",
    )
    making.add_argument(
        "--subnetworks",
        metavar="KIND",
        default="auto",
        help="auto, readout, head or trained (default: auto: heads for fully connected ReLU networks, trained elsewhere)",
    )
    making.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="of units, weights and order of samples (default: 0)",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--plot", metavar="FILE", help="draw loss and error along the path: .png, .svg or .pdf"
    )
    results.add_argument(
        "--json",
        metavar="FILE",
        help="write the result as JSON; - is stdout, and nothing else then is",
    )
    results.add_argument("--quiet", "-q", action="store_true", help="print nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Check everything, connect, print and write."""
    options.check_inputs(args.checkpoints)
    options.check_outputs({"--plot": args.plot, "--json": args.json}, args.checkpoints)
    options.check_plot(args.plot)
    out = Path(args.out)
    if out.exists():
        raise ModeconnError(
            f"--out {args.out} is there already: name a folder that is not, or remove it"
        )
    if not 0 <= args.seed < 2**31:
        raise ModeconnError(f"--seed {args.seed}: expected at least 0 and below 2**31")

    from modeconn.connection.pipeline import connect

    spec, model = options.load_model(args, args.checkpoints)
    data, test = (options.load_data(args, split) for split in ("train", "test"))
    quiet = args.quiet or args.json == "-"
    unfinished = out.with_name(f"{out.name}.partial")
    connection = connect(
        model,
        args.checkpoints[0],
        args.checkpoints[1],
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
    connection.save(out)
    shutil.rmtree(unfinished)
    if args.plot is not None:
        _plot(connection, model, data, args.plot)
    if args.json is not None:
        output.write_json(_content(connection), args.json)
    if not quiet:
        print(connection)
        _print_table(connection)
        output.print_written(args.out, args.plot, args.json)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plot(connection: Connection, model: nn.Module, data: Any, file: str) -> None:
    """Two more passes, for the curves of the swings and for the straight line."""
    from modeconn.evaluation.evaluator import evaluate
    from modeconn.parameters.paths import Line

    first, last = connection.path.control_points[0], connection.path.control_points[-1]
    line = evaluate(model, Line(first, last), data, points=25)
    result = connection.evaluate(model, data)
    output.write_figure(lambda ax: connection.plot(ax, line=line, result=result), file)


def _content(connection: Connection) -> dict[str, Any]:
    test = connection.test_certificate
    return {
        "certificate": connection.certificate.to_dict(),
        "test_certificate": None if test is None else test.to_dict(),
        "details": connection.details,
    }


def _print_table(connection: Connection) -> None:
    rows = [
        [
            f"S_{found['entry']}" + ("" if found["entry"] == 0 else f" of {found['side']}"),
            found["method"],
            "-".join(map(str, found["widths"])) or "readout",
            f"{found['loss']:.4g}",
            f"{100 * found['error']:.3g} %",
            str(found["epochs"]),
            output.seconds_text(found["seconds"]),
        ]
        for found in connection.details["found"]
        if found["entry"] or found["side"] == "a"
    ]
    output.print_table(["subnetwork", "kind", "widths", "loss", "error", "epochs", "time"], rows)
