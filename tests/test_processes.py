"""Long-lived and forked processes: memory and descriptors stay flat, locks and threads are lost."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import modeconn as mc
from modeconn.capture import cache
from modeconn.parameters import forking
from naive import mlp

linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(16) % 3
CALLS = 500
# Bytes per call that allocators may keep: they give back pages, not every piece.
RESIDENT = 1024


def objects() -> tuple[int, int]:
    """Objects that Python follows, and open files.

    Not tracemalloc: it goes on counting what PyTorch frees by itself.
    """
    gc.collect()
    return len(gc.get_objects()), sum(1 for _ in Path("/proc/self/fd").iterdir())


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@linux
def test_memory_and_descriptors_are_flat_over_many_calls(tmp_path: Path):
    a, b = mlp(4, 5, 3), mlp(4, 5, 3, seed=1)

    def call(number: int) -> None:
        # new networks and paths each time, as in a search; a file that is resumed now and then
        path = mc.Line({k: v + number for k, v in a.state_dict().items()}, b)
        options = {"resume": tmp_path / f"{number % 3}"} if number % 20 == 0 else {}
        if options:
            options["resume"].unlink(missing_ok=True)
        mc.evaluate(a, path, (X, Y), 2, progress=False, **options)

    for number in range(CALLS):  # allocators take their pages in the first of them
        call(number)
    before = objects()
    call(0)
    memory = resident()
    for number in range(CALLS):
        call(number)
    # Before the list of all objects, which takes megabytes itself.
    kept = resident() - memory
    now = objects()
    assert now[0] - before[0] < CALLS // 10, "objects stay"
    assert now[1] == before[1], "files stay open"
    assert kept <= CALLS * RESIDENT


def test_graphs_go_with_their_models():
    def one() -> None:
        model = mlp(4, 6, 3)
        mc.evaluate(model, mc.Line(model, mlp(4, 6, 3, seed=1)), (X, Y), 2, progress=False)

    one()
    gc.collect()
    before = len(cache._GRAPHS)
    for _ in range(3):
        one()
    gc.collect()
    assert len(cache._GRAPHS) == before


def in_child(function: object) -> str:
    """What a function returns, as text, in a forked process; its error otherwise."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(function())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writes, said.encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(child, 0)
    return said


FORKED = """
import os, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import modeconn as mc
from naive import mlp
from test_processes import in_child

a, b = mlp(40, 50, 10), mlp(40, 50, 10, seed=1)
x, y = torch.randn(4000, 40), torch.arange(4000) % 10

def run():
    return mc.evaluate(a, mc.Line(a, b), (x, y), 3, progress=False).loss.tolist()

def alone():
    torch.set_num_threads(1)
    return run()

for threads in (1, 2):
    torch.set_num_threads(threads)
    torch.randn(600, 600) @ torch.randn(600, 600)
    print(run())
    print(in_child(run))
    print(in_child(alone))
"""


@linux
def test_a_forked_process_computes_or_says_that_it_cannot():
    """In a process of its own: this one may have computed in several threads already."""
    script = FORKED.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    here, forked, alone, *with_threads = done.stdout.splitlines()
    assert forked == alone == here
    here, forked, alone = with_threads
    assert forked.startswith("ModeconnError: this process was forked from one that had computed")
    got, want = (torch.tensor(eval(text)) for text in (alone, here))
    torch.testing.assert_close(got, want)  # what forked says to do works


def test_a_lock_that_another_thread_holds_is_free_in_a_forked_process():
    lock, taken, done = forking.Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()

    def acquires() -> str:
        with lock:
            pass
        forking.check_fork()
        return "acquired"

    said = in_child(acquires)
    done.set()
    thread.join()
    if torch.get_num_threads() == 1:  # else the lost pool of threads is what is said
        assert "this process was forked while another thread captured a model" in said
    else:
        assert "this process was forked from one that had computed in several threads" in said
    with lock, lock:  # its own thread takes it again
        assert not lock.held()
    if torch.get_num_threads() == 1:
        assert in_child(acquires) == "acquired"
