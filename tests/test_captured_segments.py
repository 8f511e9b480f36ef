"""Segments of paths through any captured graph: what is certified is true, and lies are refused."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captured_networks import between, inputs, network, state_of
from modeconn.connection.captured.structure import CapturedStructure
from modeconn.errors import ModeconnError

KINDS = ("residual", "bottleneck", "transformer", "mixed", "unknown")


@functools.cache  # tracing a network takes a good part of a second
def structure_of(kind: str) -> CapturedStructure:
    return CapturedStructure.of(network(kind), inputs(kind))


@functools.cache
def state_with_dead_units(kind: str) -> dict[str, torch.Tensor]:
    """Half of the columns of many weights are zero, so that many units are dead."""
    generator = torch.Generator().manual_seed(3)
    state = state_of(network(kind))
    for key, value in state.items():
        if value.dim() > 1 and not key.startswith(("first", "embed", "last", "head")):
            value[:, torch.rand(value.shape[1], generator=generator) < 0.6] = 0
    return state


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    entries=st.integers(1, 3),
    whole=st.booleans(),
)
def test_what_is_certified_holds_between_the_ends(
    kind: str, seed: int, entries: int, whole: bool
) -> None:
    rng = np.random.default_rng(seed)
    structure, start = structure_of(kind), state_with_dead_units(kind)
    keys = [key for key, value in start.items() if value.is_floating_point()]
    stop = dict(start)
    for key in rng.choice(keys, entries):
        value = stop[key].clone()
        row = ... if whole and value.dim() < 2 else rng.integers(len(value))
        value[row] = torch.rand_like(value[row]) + 0.1  # variances stay positive
        stop[key] = value
    x = inputs(kind)
    first, last = structure.run(start, x), structure.run(stop, x)
    try:
        found = structure.classify(start, stop)
    except ModeconnError:
        return
    for t in (0.0, 0.25, 0.6, 1.0):
        expected = first if found.kind == "rewrite" else (1 - t) * first + t * last
        inside = structure.run(between(start, stop, t), x)
        torch.testing.assert_close(inside, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["residual", "transformer", "mixed", "unknown"])
def test_the_last_layer_swings(kind: str) -> None:
    start = state_of(network(kind))
    key = "head" if kind == "transformer" else "last"
    stop = {
        **start,
        f"{key}.weight": start[f"{key}.weight"] + 1,
        f"{key}.bias": -start[f"{key}.bias"],
    }
    found = structure_of(kind).classify(start, stop)
    assert found.kind == "swing" and set(found.moved) == {f"{key}.weight", f"{key}.bias"}


def test_dead_heads_and_dead_units_of_a_transformer_are_rewritten() -> None:
    start = state_of(network("transformer"))
    start["out.weight"][:, 4:8] = 0  # of three heads the second
    start["down.weight"][:, [2, 5]] = 0
    stop = {key: value.clone() for key, value in start.items()}
    for part in range(3):
        stop["qkv.weight"][12 * part + 4 : 12 * part + 8] += 1
        stop["qkv.bias"][12 * part + 4 : 12 * part + 8] -= 1
    stop["up.weight"][[2, 5]] = 3
    assert structure_of("transformer").classify(start, stop).kind == "rewrite"


def test_a_live_head_and_an_outgoing_weight_are_refused_by_name() -> None:
    structure, start = structure_of("transformer"), state_of(network("transformer"))
    start["out.weight"][:, 4:8] = 0
    stop = {key: value.clone() for key, value in start.items()}
    stop["qkv.weight"][8] += 1  # the third head's queries
    with pytest.raises(ModeconnError, match=r"linear \(qkv .*reads qkv\.weight.* row 8"):
        structure.classify(start, stop)
    stop = {
        **start,
        "qkv.weight": start["qkv.weight"].clone(),
        "out.weight": start["out.weight"].clone(),
    }
    stop["qkv.weight"][4] += 1
    stop["out.weight"][0, 4] = 5e-324  # the head comes alive while it changes
    with pytest.raises(ModeconnError, match="live"):
        structure.classify(start, stop)


def test_an_operation_without_a_rule_is_named() -> None:
    start = state_of(network("unknown"))
    start["last.weight"][:, 2] = 0
    stop = {**start, "first.weight": start["first.weight"].clone()}
    stop["first.weight"][2] += 1
    with pytest.raises(ModeconnError, match=r"below cumsum .* is not known"):
        structure_of("unknown").classify(start, stop)
    reach, where = structure_of("unknown").largest(start, start, inputs("unknown"))
    assert math.isnan(reach) and "cumsum" in where  # a dead unit might overflow
    alive = state_of(network("unknown"))
    assert math.isfinite(structure_of("unknown").largest(alive, alive, inputs("unknown"))[0])


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("first.weight", math.nan, "not finite"),
        ("first.weight", math.inf, "not finite"),
        ("norm.running_var", -1.0, "variance cannot be negative"),
    ],
)
def test_values_that_make_nan_of_dead_units_are_refused(key: str, value: float, text: str) -> None:
    start = state_of(network("residual"))
    stop = {**start, key: start[key].clone()}
    stop[key].view(-1)[0] = value
    for ends in ((start, stop), (stop, start), (stop, stop)):
        with pytest.raises(ModeconnError, match=text):
            structure_of("residual").classify(*ends)


def test_dead_units_that_overflow_inside_are_bounded() -> None:
    """At both ends the dead channel is finite, in the middle it is the product of both changes."""
    structure, start = structure_of("residual"), state_of(network("residual"))
    body = "body.3"
    start[f"{body}.conv2.weight"][:, 1] = 0
    stop = {key: value.clone() for key, value in start.items()}
    start[f"{body}.conv1.weight"][1] = 1e200
    start[f"{body}.bn1.weight"][1] = 0
    stop[f"{body}.conv1.weight"][1] = 0
    stop[f"{body}.bn1.weight"][1] = 1e200
    assert structure.classify(start, stop).kind == "rewrite"
    x = inputs("residual")
    assert structure.run(start, x).isfinite().all() and structure.run(stop, x).isfinite().all()
    assert not structure.run(between(start, stop, 0.5), x).isfinite().all()
    reach, where = structure.largest(start, stop, x.abs().amax(0, keepdim=True))
    assert not reach <= 3e38 and "body.3" in where


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "unknown"])
def test_bounds_are_above_all_values(kind: str) -> None:
    structure, start = structure_of(kind), state_of(network(kind))
    stop = state_of(network(kind, seed=7))
    x = inputs(kind, rows=40)
    reach, _ = structure.largest(start, stop, x.abs().amax(0, keepdim=True))
    for t in (0.0, 0.4, 1.0):
        assert float(structure.run(between(start, stop, t), x).abs().max()) <= reach


def test_tied_tensors_that_differ_are_refused() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.last = (torch.nn.Linear(4, 4) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.last(torch.relu(self.b(torch.relu(self.a(x)))))

    model = Tied().double()
    structure = CapturedStructure.of(model, torch.randn(4, 4, dtype=torch.float64))
    start = state_of(model)
    stop = {**start, "b.weight": start["b.weight"] + 1}
    with pytest.raises(ModeconnError, match="one tensor in the model, and differ"):
        structure.classify(start, stop)
    start["last.weight"][:, 1] = 0
    stop = {**start, "a.weight": start["a.weight"].clone()}
    stop["a.weight"][1] += 1
    stop["b.weight"] = stop["a.weight"]
    with pytest.raises(ModeconnError, match="live"):  # the other use of it is alive
        structure.classify(start, stop)


def test_networks_without_certificates_are_refused() -> None:
    class Batch(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.last(x - x.mean(0, keepdim=True))

    x = torch.randn(4, 4)
    with pytest.raises(ModeconnError, match="other rows"):
        CapturedStructure.of(Batch(), x)
    with pytest.raises(ModeconnError, match=r"output is \[4, 3, 4\]"):
        CapturedStructure.of(torch.nn.Conv1d(2, 3, 1), torch.randn(4, 2, 4))
