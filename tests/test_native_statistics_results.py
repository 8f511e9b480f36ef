"""Recomputed statistics in results: who computed them, and batches of one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import modeconn as mc
from native_statistics_cases import DOUBLE, drawn, rows_net


@pytest.mark.parametrize("backend", ["native", "auto", "reference"])
def test_a_norm_that_the_engine_does_not_have_is_left_to_pytorch(backend):
    """A norm over texts; the rest of the network is the engine's."""
    make = lambda: nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10)
    )
    nets = [drawn(make, seed) for seed in (1, 2)]
    x, y = torch.randn(30, 8, 5, dtype=DOUBLE), torch.arange(30) % 10
    got = mc.evaluate(
        nets[0],
        mc.Line(*nets),
        (x, y),
        3,
        buffers="recompute",
        backend=backend,
        precision="float64",
    )
    want = mc.evaluate(
        nets[0],
        mc.Line(*nets),
        (x, y),
        3,
        buffers="recompute",
        backend="reference",
        precision="float64",
    )
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-12)
    assert got.info["statistics"] == "reference"


def test_the_result_tells_what_recomputed_the_statistics():
    nets = [drawn(rows_net, seed) for seed in (1, 2)]
    data, path = (torch.randn(14, 6), torch.zeros(14, dtype=torch.long)), mc.Line(*nets)
    for backend in ("auto", "native", "reference"):
        got = mc.evaluate(nets[0], path, data, 3, buffers="recompute", backend=backend)
        assert got.info["statistics"] == ("reference" if backend == "reference" else "native")
    assert mc.evaluate(nets[0], path, data, 3, buffers="start").info["statistics"] == ""


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_batch_of_one(backend):
    nets = [drawn(rows_net, seed) for seed in (1, 2)]
    x, y = torch.randn(15, 6, dtype=DOUBLE), torch.zeros(15, dtype=torch.long)
    with pytest.raises(
        mc.ModeconnError, match="batch 2 has 1 rows, and a norm cannot estimate a variance from it"
    ) as caught:
        mc.evaluate(
            nets[0], mc.Line(*nets), (x, y), 3, buffers="recompute", backend=backend, batch_size=7
        )
    assert "\n" not in str(caught.value)
