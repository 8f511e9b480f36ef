"""Object files for tests that compile C++, kept in .cache until something they depend on changes.

The tests of one run share them, whichever process they are in, and so do later runs.
"""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "objects"


@functools.cache
def version(compiler: str) -> bytes:
    """The compiler's own words on its version and target."""
    return subprocess.run([compiler, "-v"], capture_output=True, check=True).stderr


def object_of(source: Path, headers: Path, command: Sequence[str | Path]) -> Path:
    """Compile a source to an object file, or find the one of an earlier compilation.

    Args:
        source: the file to compile.
        headers: a folder with everything of this project that it can include.
        command: compiler and flags, without the source and the output.
    """
    words = [str(word).replace(str(headers), "HEADERS") for word in command]
    parts = [version(str(command[0])), "\0".join(words).encode()]
    # Those of the engine and of the CUDA part include headers of the folder above, too.
    for file in sorted([*headers.rglob("*"), *headers.parent.glob("*.h")]):
        if file.is_file():
            parts += [str(file.relative_to(headers.parent)).encode(), file.read_bytes()]
    parts += [source.name.encode(), source.read_bytes()]
    key = hashlib.sha256()
    for part in parts:
        key.update(len(part).to_bytes(8, "little") + part)
    made = CACHE / f"{key.hexdigest()}.o"
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        subprocess.run([*map(str, command), "-c", str(source), "-o", str(partial)], check=True)
        partial.replace(made)  # whole or not there, also for other processes
    return made
