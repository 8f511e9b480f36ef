"""A certified path and its folder, for the tests of connections."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from modeconn.connection.connection import Connection
from modeconn.connection.verification import certify
from walk import KINDS, Walk, conv_net, walk


@pytest.fixture(scope="module")
def made() -> tuple[Walk, Connection]:
    torch.manual_seed(0)
    w = walk(conv_net(), (2, 8, 8))
    certificate = certify(w.model, w.chain, w.path, w.data)
    test = certify(w.model, w.chain, w.path, (w.x[:20] * 2, w.y[:20]))
    details = {
        "subnetworks": [{"entry": 0, "kept": np.arange(3), "loss": math.inf}],
        "seconds": 1.5,
    }
    return w, Connection(w.path, KINDS, certificate, test, "mine:net", details)


@pytest.fixture
def saved(made, tmp_path: Path) -> Path:
    made[1].save(tmp_path / "connection")
    return tmp_path / "connection"


def names_in(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]
