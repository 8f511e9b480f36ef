"""The command line: parse, call the library, print. One file per command.

Bad input ends with exit code 2 and one line on stderr, Ctrl-C with 130 and a line that says what
was saved.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from modeconn.cli import (
    connect,
    demo,
    evaluate,
    explain,
    inspect,
    mix,
    plane,
    reproduce,
    train,
    verify,
)
from modeconn.cli.options import Parser, example
from modeconn.errors import ModeconnError

COMMANDS = (demo, train, evaluate, explain, plane, mix, connect, verify, reproduce, inspect)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, without the program's name; those of the process if None.

    Returns:
        The exit code: 0; 2 for bad input; 130 after Ctrl-C; 1 where the system failed (a full disk,
        for instance).
    """
    _prepare_streams()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            parser = _parser()
            args = parser.parse_args(argv)
            if "run" not in args:
                parser.print_help()
                return 0
            args.run(args)
            sys.stdout.flush()
            return 0
    # argparse: --help, --version, or an error that Parser has already shown
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except ModeconnError as error:
        return _fail(f"error: {error}", 2)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted, nothing was saved", 130)
    except BrokenPipeError:
        # The reader of a pipe has gone (`modeconn inspect … | head`); Python would complain again
        # on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(f"error: {error}", 1)


def _parser() -> Parser:
    parser = Parser(
        prog="modeconn",
        description="Loss along paths between neural networks, in one pass over the data.",
        epilog=example(
            "modeconn demo",
            "It needs no files. Then see modeconn train --help and modeconn evaluate --help.",
        ),
    )
    parser.add_argument("--version", action="version", version=f"modeconn {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("modeconn")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _prepare_streams() -> None:
    """Replaces characters of a plot that a terminal cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _fail(message: str, code: int) -> int:
    print(f"modeconn: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"modeconn: warning: {_one_line(message)}", file=file or sys.stderr, flush=True)
