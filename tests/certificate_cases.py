"""Certified paths that the tests of certificates share."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from modeconn.connection.connection import Connection
from modeconn.connection.verification import Claims, certify
from naive import mlp
from walk import Walk, conv_net, walk


@functools.cache  # tracing a network takes a good part of a second
def walk_of(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Walk:
    if kind == "conv":
        torch.manual_seed(seed)
        return walk(conv_net(), (2, 8, 8), seed, dtype=dtype)
    activation = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}[kind]
    return walk(mlp(5, 8, 9, 6, 4, activation=activation), (5,), seed, dtype=dtype)


@pytest.fixture(scope="module", params=["relu", "conv"])
def made(request) -> tuple[Walk, Connection]:
    """A path and its certified connection; tests do not change them."""
    w = walk_of(request.param)
    return w, connect(w)


def connect(w: Walk, **options) -> Connection:
    certificate = certify(w.model, w.chain, w.path, w.data, Claims(**options))
    return Connection(w.path, [segment.kind for segment in certificate.segments], certificate)


def changed(w: Walk, k: int, key: str, where, value: float) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in w.points[k].items()}
    state[key][where] += value
    return state
