"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from modeconn.errors import ModeconnError

# The names that `atomic_write` gives to files that are not complete yet.
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.tmp")
# A temporary file that has not grown for so long belongs to a writer that was killed.
_SECONDS_UNTIL_ABANDONED = 60.0


def atomic_write(file: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at every moment either the old content or the complete new one is there.

    Args:
        file: the file to write; its folder must exist.
        write: called with the stream to write to. If it raises, or is interrupted, nothing stays
            behind.

    Raises:
        ModeconnError: the file cannot be written, with the system's reason.
    """
    # through a link to the file that it stands for
    target = Path(os.path.realpath(Path(file).expanduser()))
    if target.is_dir():
        raise ModeconnError(f"{file}: is a folder; expected the name of a file to write")
    if not target.parent.is_dir():
        raise ModeconnError(f"{file}: cannot be written: there is no folder {target.parent}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except OSError as error:
        raise ModeconnError(f"{file}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # gone already if all went well
            temporary.unlink()


def is_temporary(file: Path) -> bool:
    """Whether a file has the name of one that `atomic_write` has not completed."""
    return _TEMPORARY.fullmatch(file.name) is not None


def sweep(file: Path) -> None:
    """Remove what killed writers of a file left behind."""
    target = Path(os.path.realpath(file.expanduser()))
    if not target.parent.is_dir():
        return
    for other in target.parent.iterdir():
        match = _TEMPORARY.fullmatch(other.name)
        if match is None or match["target"] != target.name:
            continue
        with contextlib.suppress(OSError):  # another process may sweep, too
            if time.time() - other.stat().st_mtime > _SECONDS_UNTIL_ABANDONED:
                other.unlink()
