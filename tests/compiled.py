#!/usr/bin/env python3
"""Object files for tests that compile C++, kept in .cache until what they are made of changes.

The tests of one run share them, whichever process they are in, and so do later runs. As a program
it is the C++ compiler in front of that store, for `CXX`:

    CXX=tests/compiled.py python setup.py build_ext
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "objects"
CXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


@functools.cache
def version(compiler: str) -> bytes:
    """The compiler's own words on its version and target."""
    return subprocess.run([compiler, "-v"], capture_output=True, check=True).stderr


def object_of(source: Path, command: Sequence[str | Path]) -> Path:
    """Compile a source to an object file, or find the one of an earlier compilation.

    It is known by the preprocessed source, the flags and the compiler, so that folders and comments
    may change.

    Args:
        source: the file to compile.
        command: compiler and flags, without the source and the output.

    Raises:
        subprocess.CalledProcessError: the compiler failed.
    """
    words = [str(word) for word in command]
    # The folders of headers show in what is included.
    flags = [word for word in words if not word.startswith(("-I", "-iquote"))]
    text = subprocess.run([*words, "-E", "-P", str(source)], stdout=subprocess.PIPE, check=True)
    key = hashlib.sha256()
    for part in (version(words[0]), "\0".join(flags).encode(), text.stdout):
        key.update(len(part).to_bytes(8, "little") + part)
    made = CACHE / f"{key.hexdigest()}.o"
    if made.exists():
        return made
    CACHE.mkdir(parents=True, exist_ok=True)
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # what another process compiles is waited for
        if not made.exists():
            partial = made.with_suffix(f".{os.getpid()}")
            subprocess.run([*words, "-c", str(source), "-o", str(partial)], check=True)
            partial.replace(made)  # whole or not there, also after a kill
    return made


def main(arguments: list[str]) -> int:
    """Compiles by `object_of` if it is one source to an object file, else calls the compiler."""
    assert CXX is not None
    sources = [word for word in arguments if word.endswith(".cpp")]
    if "-c" not in arguments or "-o" not in arguments or len(sources) != 1:
        return subprocess.run([CXX, *arguments], check=False).returncode
    target = arguments[arguments.index("-o") + 1]
    kept = [word for word in arguments if word not in ("-c", "-o", sources[0], target)]
    try:
        shutil.copyfile(object_of(Path(sources[0]), [CXX, *kept]), target)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
