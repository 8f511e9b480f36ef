"""Writing replaces regular files alone, by one writer at a time, and kills leave nothing behind."""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import connection_cases
import modeconn as mc
from file_cases import result, trained
from modeconn.errors import ModeconnError, SystemFailure
from modeconn.files import writing as files
from modeconn.files.writing import atomic_write, locked, sweep
from modeconn.resuming import claim
from refused import refused

# Fixtures.
made = connection_cases.made
saved = connection_cases.saved


def test_pipes_and_devices_are_written_into(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    atomic_write(pipe, lambda stream: stream.write(b"whole"))
    reader.join()
    assert received == [b"whole"] and pipe.is_fifo()
    device = Path(os.devnull).stat()
    atomic_write(os.devnull, lambda stream: stream.write(b"whole"))
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    result().save(tmp_path / "r.json")
    atomic_write(link, lambda stream: stream.write(b"whole"))
    assert Path(os.devnull).stat().st_rdev == device.st_rdev and link.is_symlink()


def test_links_in_a_circle_and_sockets_are_refused(tmp_path: Path):
    import socket

    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with refused(str(tmp_path / "a")):
        atomic_write(tmp_path / "a", lambda stream: stream.write(b""))
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        with refused("is a socket"):
            atomic_write(tmp_path / "s", lambda stream: stream.write(b""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "s"]


def test_a_failure_of_the_system_is_told_from_bad_input(tmp_path: Path):
    with pytest.raises(SystemFailure, match="No space left"):
        atomic_write("/dev/full", lambda stream: stream.write(b"x"))
    assert issubclass(SystemFailure, ModeconnError)


def test_a_target_has_one_writer(tmp_path: Path):
    file = tmp_path / "a"
    with locked(file):
        with refused(f"{file} is being written by another command"), locked(file):
            pytest.fail("two hold it")
        with locked(tmp_path / "b"):
            pass
    with locked(file):
        pass
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from modeconn.files.writing import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert trained(file) == 2
        holder.kill()
    assert trained(file) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_temporaries_of_all_outputs_are_swept(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    for name in (file.name, f"{file.name}.training", "j.json"):
        (tmp_path / f".{name}.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".mine.0123abcd.tmp").write_bytes(b"of another name")
    assert trained(file, "--json", str(tmp_path / "j.json")) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".mine.0123abcd.tmp", file.name, "j.json"]


def test_a_lone_temporary_of_a_claimed_folder_is_swept(tmp_path: Path):
    for name in (".search.json.1234abcd.tmp", ".fit-001.safetensors.1234abcd.tmp"):
        (tmp_path / name).write_bytes(b"{")
    claim(tmp_path, "search.json", "search", {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def test_what_is_swept_is_no_folder_of_a_living_writer(tmp_path: Path):
    content = io.BytesIO(b"x" * 10)

    def write(stream) -> None:
        stream.write(content.getvalue())
        stream.flush()
        sweep(tmp_path / "a")

    atomic_write(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == content.getvalue()


def killed_at(number: int, action: Callable[[], object], swaps: bool) -> int:
    """Run an action in a process that is killed before or after one of its calls; its status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            before = 2 * calls
            calls += 1
            if number == before:
                os._exit(9)
            done = function(*args, **kwargs)
            if number == before + 1:
                os._exit(9)
            return done

        return called

    try:
        files._swapped = killing(files._swapped) if swaps else lambda one, other: False
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "mkdir")):
            setattr(owner, name, killing(getattr(owner, name)))
        files.shutil.rmtree = killing(files.shutil.rmtree)
        action()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("swaps", [True, False])
def test_a_connection_is_whole_wherever_saving_it_is_killed(
    saved: Path, tmp_path: Path, swaps: bool
):
    """The old one or the new one is in place, or comes back when it is read."""
    first = mc.Connection.load(saved)
    second = dataclasses.replace(first, model="other:net")
    for number in range(40):
        folder = tmp_path / f"{number}"
        first.save(folder)
        status = killed_at(number, functools.partial(second.save, folder), swaps)
        assert status in (0, 9)
        assert mc.Connection.load(folder).model in (first.model, second.model)
        second.save(folder)  # sweeps what the killed one left
        assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []
        assert mc.Connection.load(folder).model == second.model
        if status == 0:
            assert number > 3
            return
    pytest.fail("it was killed each time")
