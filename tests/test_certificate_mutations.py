"""Every number, text and tensor of a saved connection, changed: refused, or without effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mutation_cases
from modeconn.connection import measurement, verification
from modeconn.connection.certificate import Certificate
from modeconn.connection.structure import ChainStructure
from modeconn.errors import ModeconnError
from modeconn.files.fingerprints import digest_of_tensors
from mutation_cases import (
    Place,
    PlainForward,
    Saved,
    changes_of,
    leaves,
    value_at,
    with_entry,
    with_value,
)
from naive import pass_per_point


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Saved:
    with pytest.MonkeyPatch.context() as patch:
        found = mutation_cases.saved(tmp_path_factory.mktemp("mutations") / "c")
        structure = ChainStructure(found.walk.chain)
        patch.setattr(mutation_cases, "CHAIN", found.walk.chain)
        patch.setattr(measurement, "PlannedForward", PlainForward)
        patch.setattr(verification, "structure_of", lambda model, sample: structure)
        patch.setattr(verification, "measure_path", remembered(verification.measure_path))
        yield found


def remembered(measure):
    """Measure a path on some data once: most changes are not of the path."""
    results = {}

    def measured(subject, data, how):
        key = (len(data[0]), *map(digest_of_tensors, subject.path.control_points))
        if key not in results:
            results[key] = measure(subject, data, how)
        return results[key]

    return measured


def is_claim(place: Place, before: object, after: object) -> bool:
    """Whether a value is one that no weights or data can tell, or is true still."""
    top, last = place[0], place[-1]
    if top in ("details", "sha256", "digest", "model"):
        return True
    if last == "target" or "labels" in place:
        return True  # neither is used: the caller has the target, and the label is a plain one
    if "rounding" in place:  # higher bounds hold as well, and both are None for what has none
        return after == "inf" or (not isinstance(after, str) and after >= 0.99 * before)
    # Another place of the same largest error; or the certificate of data that nobody has here.
    return last == "max_error_at" or last == "digest"


def assert_unharmed(made: Saved, found: Certificate) -> None:
    """The recomputed certificate is the true one: nothing of it was taken from the folder."""
    truth = made.truth
    assert found.bound == truth.bound
    assert (found.losses, found.errors) == (truth.losses, truth.errors)
    assert (found.segments, found.rounding) == (truth.segments, truth.rounding)
    assert found.target is None
    assert set(found.labels) <= {*truth.labels, *(f"breakpoint {k}" for k in range(7))}


def test_the_connection_itself_verifies(made):
    assert made.truth.same_data
    assert made.truth.test.same_data
    assert any("'my own'" in line for line in made.truth.checked)
    assert any("target 50: a claim" in line for line in made.truth.checked)


def try_content(made: Saved, place: Place, value: object) -> None:
    before = value_at(made.content, place)
    try:
        found = made.verified(with_value(made.content, place, value), made.packed)
    except ModeconnError:
        return
    assert is_claim(place, before, value), f"{place}: {before!r} -> {value!r} was accepted"
    assert_unharmed(made, found)
    if place == ("certificate", "digest"):
        assert not found.same_data
    if place == ("test_certificate", "digest"):
        assert not found.test.same_data


def test_every_value_of_the_table(made):
    places = list(leaves(made.content))
    assert len(places) > 200
    for i, place in enumerate(places):
        changes = changes_of(value_at(made.content, place))
        chosen = {0, 1 + i % max(1, len(changes) - 1)} & set(range(len(changes)))
        # Both certificates are read and compared by the same code.
        if place[0] == "test_certificate":
            chosen = {i % len(changes)}
        for value in (changes[j] for j in chosen):
            try_content(made, place, value)


def assert_holds(made: Saved, packed: dict[str, torch.Tensor], found: Certificate) -> None:
    """Losses and errors of a changed path stay below the certificate that was recomputed."""
    path = made.connection(made.content, packed).path
    t = np.random.default_rng(0).random(20)
    sampled = pass_per_point(made.walk.model, path, *made.walk.data, t, torch.float64)
    assert sampled["loss"].max() <= found.bound * (1 + 1e-12)
    assert sampled["error"].max() <= found.error_bound + 1e-12


def test_every_tensor(made):
    generator = torch.Generator().manual_seed(0)
    accepted = 0
    for name, tensor in made.packed.items():
        some = torch.randint(tensor.numel(), (2,), generator=generator).tolist()
        for index in {*some, tensor.numel() - 1}:
            packed = with_entry(made.packed, name, index)
            try:
                found = made.verified(made.content, packed)
            except ModeconnError:
                continue
            accepted += 1
            assert_unharmed(made, found)
            assert_holds(made, packed, found)
    assert 0 < accepted < len(made.packed)  # dead rows alone


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_pairs(made, data):
    """Two changes do not hide each other."""
    content, packed, claims = made.content, made.packed, True
    for _ in range(2):
        if data.draw(st.integers(0, 2)):
            place = data.draw(st.sampled_from(list(leaves(made.content))))
            before = value_at(made.content, place)
            value = data.draw(st.sampled_from(changes_of(before)))
            content = with_value(content, place, value)
            claims &= is_claim(place, before, value)
        else:
            name = data.draw(st.sampled_from(sorted(made.packed)))
            index = data.draw(st.integers(0, made.packed[name].numel() - 1))
            packed = with_entry(packed, name, index)
    try:
        found = made.verified(content, packed)
    except ModeconnError:
        return
    assert claims
    assert_unharmed(made, found)
    assert_holds(made, packed, found)


def test_lies_that_agree_with_each_other(made):
    """A loss is lowered wherever it is written, a target raised, an outcome made to fit."""
    content = made.content
    worst = made.truth.worst
    for place in list(leaves(content["certificate"])):
        value = value_at(content["certificate"], place)
        if isinstance(value, float) and value == made.truth.losses[worst]:
            content = with_value(content, ("certificate", *place), value * (1 - 1e-9))
    losses = content["certificate"]["losses"]
    content = with_value(content, ("certificate", "bound"), max(losses))
    with pytest.raises(ModeconnError, match="the loss at breakpoint"):
        made.verified(content, made.packed)
    content = made.content
    for place in [("certificate", "target"), ("test_certificate", "target"), ("details", "target")]:
        content = with_value(content, place, 99.0)
    found = made.verified(content, made.packed)
    assert_unharmed(made, found)
    assert any("target 99: a claim, not used" in line for line in found.checked)
