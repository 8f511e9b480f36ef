"""pytest-benchmark cases, a minute in all: `pytest bench/cases --benchmark-json=out.json`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import modeconn as mc
import peers
import workloads
from modeconn.backends import NAMES

SAMPLES, POINTS = 6000, 5


@pytest.fixture(scope="module")
def line() -> workloads.Workload:
    return workloads.mnist_line(SAMPLES)


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.benchmark(group="line")
def test_one_pass(benchmark, line, backend):
    benchmark(mc.evaluate, line.model, line.path, (line.x, line.y), POINTS, backend=backend)


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peers.dataloader_loop, id="dataloader"),
        pytest.param(peers.whole_tensor, id="whole"),
        pytest.param(peers.functional_chunks(1000), id="functional_call"),
        pytest.param(peers.vmap_points(POINTS, 1000), id="vmap"),
    ],
)
@pytest.mark.benchmark(group="line")
def test_pass_per_point(benchmark, line, peer):
    benchmark(peer, line.model, line.path, line.x, line.y, np.linspace(0, 1, POINTS))


@pytest.mark.parametrize("backend", NAMES)
@pytest.mark.parametrize("kind", ["rewrite", "swing"])
@pytest.mark.benchmark(group="chain, 40 segments, 401 points")
def test_chain(benchmark, kind, backend):
    work = workloads.mnist_chain(SAMPLES, 40, kind)
    benchmark(mc.evaluate, work.model, work.path, (work.x, work.y), 401, backend=backend)


@pytest.mark.benchmark(group="fixed cost")
def test_capture_and_plan(benchmark, line):
    benchmark(mc.explain, line.model, line.path, line.x[:4], 101)
