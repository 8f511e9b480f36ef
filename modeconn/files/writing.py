"""Files that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import io
import os
import re
import secrets
import shutil
import stat
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from modeconn.errors import ModeconnError, SystemFailure

try:
    import fcntl
except ImportError:  # not on Windows: files are whole there, too, but no writer is known to live
    fcntl = None  # type: ignore[assignment]

# The names that `atomic_write` gives to files that are not complete yet, and a folder that is
# being replaced.
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{8}\.(?:tmp|old)")
# A writer locks its temporary file right after making it. One that is empty and so young may be
# about to; one that cannot be locked at all belongs to a killed writer if it has not grown for
# longer.
_SECONDS_UNTIL_LOCKED = 2.0
_SECONDS_UNTIL_ABANDONED = 60.0
# Of Linux: names are relative to the working directory; two of them are swapped.
_HERE, _RENAME_EXCHANGE = -100, 2


def atomic_write(file: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that at every moment either the old content or the complete new one is there.

    Only regular files are replaced: a device or pipe receives the content, and a symbolic link
    stays one, to the file that is replaced.

    Args:
        file: the file to write; its folder must exist.
        write: called with the stream to write to. If it raises, or is interrupted, nothing stays
            behind.

    Raises:
        ModeconnError: the name cannot be that of a file to write.
        SystemFailure: the file cannot be written, with the system's reason.
    """
    given = Path(file).expanduser()
    try:
        if is_special(given):
            _write_into(given, write)
            return
        # through a link to the file that it stands for
        target = Path(os.path.realpath(given))
        if target.is_dir():
            raise ModeconnError(f"{file}: is a folder; expected the name of a file to write")
        if target.is_symlink():
            raise ModeconnError(f"{file}: is a symbolic link to itself; expected a file to write")
        if not target.parent.is_dir():
            raise ModeconnError(f"{file}: cannot be written: there is no folder {target.parent}")
        _replace(target, write)
    except OSError as error:
        raise SystemFailure(f"{file}: cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, ModeconnError) or "null" not in str(error):
            raise
        raise ModeconnError(f"{str(file)!r}: {error}; expected the name of a file") from error


def is_special(file: Path) -> bool:
    """Whether a path is no regular file or folder and must not be replaced: a device or pipe."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError):
        return False
    if stat.S_ISDIR(mode):
        return False
    # an open file of a process, such as /dev/stdout: its reader would not see another
    return not stat.S_ISREG(mode) or str(file.absolute()).startswith(("/dev/", "/proc/"))


def _write_into(file: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write into a device or pipe, once the content is complete: they cannot be sought."""
    if stat.S_ISSOCK(file.stat().st_mode):
        raise ModeconnError(f"{file}: is a socket; expected a file, device or pipe to write")
    content = io.BytesIO()
    write(content)
    with file.open("ab" if stat.S_ISREG(file.stat().st_mode) else "wb", buffering=0) as stream:
        left = content.getbuffer()
        while left:
            left = left[stream.write(left) :]


def _replace(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a temporary file beside a file, and rename it over that."""
    temporary = temporary_of(target)
    try:
        with temporary.open("xb") as stream:
            _try_lock(stream.fileno())  # what `sweep` knows a living writer by
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):  # gone already if all went well
            temporary.unlink()


def check_sums(archive: zipfile.ZipFile) -> None:
    """Check all members of a zip archive by their CRC-32 sums.

    Raises:
        ValueError: a sum differs, or members are compressed or overlap, as neither PyTorch nor
            NumPy writes them: a small archive may unpack to any size.
    """
    size = os.fstat(archive.fp.fileno()).st_size if archive.fp is not None else 0
    members = archive.infolist()
    if len({each.filename for each in members}) < len(members):
        raise ValueError("it has members of the same name")
    if any(each.compress_type != zipfile.ZIP_STORED for each in members):
        raise ValueError("it has compressed members")
    if sum(each.file_size for each in members) > size:
        raise ValueError("its members are larger than the file")
    damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"the CRC-32 of its member {damaged!r} is wrong")


def temporary_of(target: Path) -> Path:
    """Return a new name beside a file or folder, for its content while that is not complete."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(file: Path) -> bool:
    """Whether a file has the name of one that `atomic_write` has not completed."""
    return _TEMPORARY.fullmatch(file.name) is not None


def sweep(file: Path) -> None:
    """Remove what killed writers of a file or folder left behind beside it, whatever its age."""
    target = Path(os.path.realpath(file.expanduser()))
    with contextlib.suppress(OSError):
        for other in target.parent.iterdir():
            match = _TEMPORARY.fullmatch(other.name)
            if match is not None and match["target"] == target.name:
                with contextlib.suppress(OSError):  # another process may sweep, too
                    _remove_abandoned(other)


def sweep_inside(folder: Path) -> None:
    """Remove what killed writers of any file in a folder or below left behind."""
    with contextlib.suppress(OSError):
        for other in [*folder.rglob(".*")]:
            if is_temporary(other):
                with contextlib.suppress(OSError):
                    _remove_abandoned(other)


def remove_folder(folder: Path) -> None:
    """Remove a folder that is done with: all of it, or none of it under its name."""
    away = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(away)
    shutil.rmtree(away, ignore_errors=True)


def exchange_folders(new: Path, target: Path) -> None:
    """Put a complete folder in the place of an older one, which goes.

    Where the system swaps names in one step, one of them is in place at every moment. Elsewhere a
    kill between two renames leaves the older one under a name that `restore_folder` knows.
    """
    if target.is_dir() and _swapped(new, target):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    if target.is_dir():
        target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        with contextlib.suppress(OSError):
            if old.is_dir() and not target.exists():
                old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(target: Path) -> None:
    """Give a folder its name back that `exchange_folders` was killed over."""
    if target.exists():
        return
    with contextlib.suppress(OSError):
        for other in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
            match = _TEMPORARY.fullmatch(other.name)
            if match is not None and match["target"] == target.name and other.is_dir():
                other.rename(target)
                return


def _swapped(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; False where the system cannot (Linux can)."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    done = call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


def _remove_abandoned(temporary: Path) -> None:
    about = temporary.lstat()
    age = time.time() - about.st_mtime
    if stat.S_ISDIR(about.st_mode):
        # Folders are written and replaced within a lock of their target.
        shutil.rmtree(temporary)
        return
    if about.st_size == 0 and age < _SECONDS_UNTIL_LOCKED:
        return
    with temporary.open("rb") as stream:
        free = _try_lock(stream.fileno())
        if free or (free is None and age > _SECONDS_UNTIL_ABANDONED):
            temporary.unlink()


def _try_lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed.

    Returns:
        False where another one holds it, None where the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


@contextlib.contextmanager
def locked(target: str | os.PathLike[str] | None) -> Iterator[None]:
    """Hold a file or folder that is about to be computed: nobody else may begin to meanwhile.

    The lock is a file ``.NAME.lock`` beside it. It ends with the process, however that ends.

    Args:
        target: it need not exist; None, devices and places without locks are not held.

    Raises:
        ModeconnError: another process, or another call in this one, holds it.
    """
    descriptor, file = None, None
    if target is not None and fcntl is not None:
        place = Path(os.path.realpath(Path(target).expanduser()))
        if not is_special(Path(target).expanduser()):
            file = place.with_name(f".{place.name}.lock")
            descriptor = _lock_file(file, os.fspath(target))
    try:
        yield
    finally:
        if descriptor is not None and file is not None:
            with contextlib.suppress(OSError):
                file.unlink()  # while it is held: who opened it before finds another in its place
            os.close(descriptor)


def _lock_file(file: Path, target: str) -> int | None:
    """Make and lock a file; None where that is not possible, which writing will tell."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError:
            return None
        free = _try_lock(descriptor)
        if free is False:
            os.close(descriptor)
            raise ModeconnError(
                f"{target} is being written by another command: wait for its end, "
                "or name another place"
            )
        try:
            if free is None or os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except OSError:
            pass  # its holder removed it in between
        os.close(descriptor)
