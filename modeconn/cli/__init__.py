"""The command line: parse, call the library, print. One file per command.

Bad input ends with exit code 2 and one line on stderr, a failure of the system with 1, Ctrl-C with
130 and SIGTERM with 143 and a line that says what was saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

from modeconn.cli import (
    align,
    check,
    connect,
    curve,
    demo,
    evaluate,
    explain,
    inspect,
    launched,
    layerwise,
    mix,
    plane,
    plot,
    reproduce,
    surface,
    train,
    verify,
)
from modeconn.cli.options import Parser, example, release_outputs, written_outputs
from modeconn.cli.output import Nowhere, Shown, is_closed, shown, version
from modeconn.errors import ModeconnError, SystemFailure, out_of_memory

LESS = ": expected less at a time, by --batch-size, where the command has it, or a larger machine"
COMMANDS = (
    demo,
    train,
    evaluate,
    explain,
    plane,
    surface,
    plot,
    layerwise,
    mix,
    align,
    connect,
    curve,
    verify,
    reproduce,
    inspect,
    check,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, without the program's name; those of the process if None.

    Returns:
        The exit code: 0; 2 for bad input; 1 where the system failed (a full disk, a missing
        permission); 130 after Ctrl-C, 143 after SIGTERM.
    """
    with _streams(), _terminable() as signals:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return _run(argv)
        # argparse: --help, --version, or an error that Parser has already shown
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0
        except SystemFailure as error:
            return _fail(f"error: {error}", 1)
        except ModeconnError as error:
            return _fail(f"error: {error}", 2)
        except KeyboardInterrupt as interrupt:
            return _fail(str(interrupt) or _interrupted(), 143 if signals else 130)
        except BrokenPipeError:
            # The reader of a pipe has gone (`modeconn inspect … | head`).
            _abandon_stdout()
            return 1
        except OSError as error:
            _abandon_stdout()
            return _fail(f"error: {error}", 1)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return _fail(f"error: out of memory ({str(error) or 'no more to be had'}){LESS}", 1)
        finally:
            release_outputs()


def _run(argv: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if "run" not in args:
        parser.print_help()
        return 0
    with launched.joined(args):
        code: int | None = args.run(args)
        sys.stdout.flush()
    return code or 0


def _interrupted() -> str:
    """Say what an interrupted command leaves."""
    files = written_outputs()
    return (
        f"interrupted; written: {', '.join(files)}" if files else "interrupted, nothing was saved"
    )


def _abandon_stdout() -> None:
    """Drop what could not be written, which Python would try again on exit, and complain."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Make SIGTERM an interrupt, as Ctrl-C is; yield the list that it is added to."""
    received: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread has signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _parser() -> Parser:
    parser = Parser(
        prog="modeconn",
        description="Loss along paths between neural networks, in one pass over the data.",
        epilog=example(
            "modeconn demo",
            "It needs no files. Then see modeconn train --help and modeconn evaluate --help.",
        ),
    )
    parser.add_argument("--version", action="version", version=f"modeconn {version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Stand in for closed streams, escape control characters, replace what cannot be encoded."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure") and not is_closed(stream):
            stream.reconfigure(errors="replace")
    sys.stdout = Nowhere() if is_closed(before[0]) else Shown(before[0])
    sys.stderr = Nowhere() if is_closed(before[1]) else before[1]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _fail(message: str, code: int) -> int:
    print(f"modeconn: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


def _one_line(text: object) -> str:
    return shown(" ".join(str(text).split()))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"modeconn: warning: {_one_line(message)}", file=file or sys.stderr, flush=True)
