"""`modeconn verify`: recomputes a connection's certificate from its breakpoints and the data."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from modeconn.cli import options, output, verify_star
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    from torch import nn

    from modeconn.connection.certificate import Certificate
    from modeconn.connection.connection import Connection
    from modeconn.connection.star import Star

DESCRIPTION = """\
Recompute the certificate of a connection from its breakpoints and the data, in float64,
bound what rounding can add, and compare every claim in the folder.
A false certificate ends with exit code 2 and one line that names the first false value.
On other data than the certificate's nothing stored is compared: the first line says so, and
the exit code is 3."""
# Nothing is false, and nothing stored was compared.
_OTHER_DATA = 3


def add(commands: options.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "verify",
        help="check a connection's certificate from its breakpoints and the data",
        description=DESCRIPTION,
        epilog=options.example("modeconn verify connection/ --data mnist --data-root DIR"),
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="written by `modeconn connect --out` or Connection.save"
    )
    parser.add_argument(
        "--model",
        metavar="SPEC",
        help="mlp:IN-HIDDENxCOUNT-OUT, …, or package.module:factory "
        "(default: the built-in model that the connection names)",
    )
    for end, place in (("a", "first"), ("b", "last")):
        parser.add_argument(
            f"--{end}",
            metavar="CHECKPOINT",
            help=f"network that the path's {place} point must equal, bit for bit "
            "(default: not compared)",
        )
    parser.add_argument(
        "--target",
        metavar="LOSS",
        type=float,
        help="loss that the path should not exceed; the stored target is a claim, and is not used",
    )
    parser.add_argument(
        "--require-same-data",
        action="store_true",
        help="end with exit code 2 on other data than those of the certificate",
    )
    options.add_data(parser)
    options.add_batch_size(parser)
    options.add_results(parser, "loss and error along the path", "the certificate")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Loads, verifies, prints and writes; returns the exit code."""
    ends = [file for file in (args.a, args.b) if file is not None]
    options.check_inputs(ends)
    options.check_outputs({"--plot": args.plot, "--json": args.json}, ends)
    options.check_plot(args.plot)

    from modeconn.connection.connection import Connection
    from modeconn.connection.star import Star, is_star
    from modeconn.connection.verification import verify
    from modeconn.evaluation.progress import reporting

    if is_star(args.folder):
        star = Star.load(args.folder)
        return 0 if verify_star.run(args, star, _model(args, star)) else _OTHER_DATA
    connection = Connection.load(args.folder)
    model = _model(args, connection)
    data = options.load_data(args)
    started = time.perf_counter()
    with reporting(output.on_terminal() and not args.quiet, what="verify") as report:
        found = verify(
            model,
            connection,
            data,
            args.batch_size,
            report,
            a=args.a,
            b=args.b,
            test=_test_data(args, connection),
            target=args.target,
            require_same_data=args.require_same_data,
        )
    seconds = time.perf_counter() - started
    if args.plot is not None:
        _plot(connection, model, data, found, args.plot)
    if args.json is not None:
        output.write_json(_content(found, args), args.json)
    if not args.quiet and args.json != "-":
        _print(found, args, seconds)
        output.print_written(args.plot, args.json)
    return 0 if found.same_data else _OTHER_DATA


def _test_data(args: argparse.Namespace, connection: Connection) -> Any:
    """Returns the data of the stored certificate of other data, as `modeconn connect` has them."""
    if connection.test_certificate is None or args.split != "train":
        return None
    return options.load_data(args, "test")


def _model(args: argparse.Namespace, connection: Connection | Star) -> nn.Module:
    from modeconn import models

    # A file must not decide which code is imported, so a factory is never taken from it.
    spec = args.model or connection.model
    if spec is None or (args.model is None and not models.is_builtin(spec)):
        raise ModeconnError(
            f"--model is missing, and {args.folder} does not say which built-in model it is"
        )
    return models.build(spec)


def _content(found: Certificate, args: argparse.Namespace) -> dict[str, Any]:
    return {
        **found.to_dict(),
        "same_data": found.same_data,
        "checked": list(found.checked),
        "test_certificate": None if found.test is None else found.test.to_dict(),
        "folder": args.folder,
        "data": f"{args.data} {args.split}",
    }


def _plot(
    connection: Connection, model: nn.Module, data: Any, found: Certificate, file: str
) -> None:
    """Draws the certificate; two more passes give the swings' curves and the straight line."""
    from modeconn.connection import figure
    from modeconn.evaluation.evaluator import evaluate
    from modeconn.parameters.paths import Line

    result = connection.evaluate(model, data, progress=False)
    points = connection.path.control_points
    line = evaluate(model, Line(points[0], points[-1]), data, points=25, progress=False)
    output.write_figure(lambda ax: figure.draw(found, ax, line, result), file)


def _print(found: Certificate, args: argparse.Namespace, seconds: float) -> None:
    data = f"{args.data} {args.split}"
    if found.same_data:
        print(f"verified: the weights and {data} bear out the certificate")
    else:
        print(
            f"OTHER DATA: nothing stored was compared, for {data} are not the data of the "
            "certificate; the bounds below are theirs alone"
        )
    print(found)
    if found.test is not None:
        print(f"\ntest data: {found.test.summary}")
    print("\nchecked:")
    for line in found.checked:
        print(f"  {output.shown(line)}")
    print(f"\nin {output.seconds_text(seconds)}")
