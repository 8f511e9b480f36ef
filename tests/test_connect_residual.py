"""Paths between residual networks: exact moves, wrong orders refused, connected and verified."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from captured_networks import Residual, between, inputs, network, randomize, state_of
from modeconn.connection.captured.structure import CapturedStructure
from modeconn.connection.construct import Breakpoint
from modeconn.connection.residual.construct import on_the_input, residual_breakpoints
from modeconn.connection.residual.entries import EntryValue, entries_of
from modeconn.connection.residual.network import ResidualNetwork
from modeconn.connection.residual.subnetwork import ResidualSubnetwork
from modeconn.errors import ModeconnError


@functools.cache
def recognised(kind: str) -> tuple[ResidualNetwork, CapturedStructure]:
    model, x = network(kind), inputs(kind)
    return ResidualNetwork.of(model, x), CapturedStructure.of(model, x)


def subnetworks(
    net: ResidualNetwork, state: dict[str, Tensor], entries: list[EntryValue]
) -> list[ResidualSubnetwork]:
    """Random subnetworks, with norms that are not the identity."""
    made = []
    for entry in entries:
        subnetwork = ResidualSubnetwork(net, entry, state).eval()
        for module in subnetwork.modules():
            if isinstance(module, nn.BatchNorm2d):
                randomize(module)
        made.append(subnetwork)
    return made


def path(kind: str, entries: list[EntryValue]) -> list[Breakpoint]:
    """The breakpoints of a path through random subnetworks of two random networks."""
    net, _ = recognised(kind)
    a, b = state_of(network(kind)), state_of(network(kind, seed=5))
    of_a, of_b = subnetworks(net, a, entries[:-1]), subnetworks(net, b, entries[:-1])
    shared = on_the_input(net, a, entries[-1], of_a[-1])
    return residual_breakpoints(net, a, [*of_a, shared], b, [*of_b, shared])


@pytest.mark.parametrize(
    ("kind", "inner"),
    [("residual", None), ("residual", ()), ("residual", (1, 2, 3, 4)), ("bottleneck", None)],
)
def test_rewrites_are_constant_and_swings_below_their_chords(kind: str, inner) -> None:
    net, structure = recognised(kind)
    points = path(kind, entries_of(net, inner))
    x, y = inputs(kind), torch.tensor([0, 1, 2, 0, 1, 2])

    def loss(state: dict[str, Tensor]) -> float:
        return float(F.cross_entropy(structure.run(state, x), y))

    for key, value in network(kind).state_dict().items():
        assert torch.equal(points[0].state[key], value)
    for key, value in network(kind, seed=5).state_dict().items():
        assert torch.equal(points[-1].state[key], value)
    for start, stop in itertools.pairwise(points):
        assert structure.classify(start.state, stop.state).kind == stop.kind
        ends = loss(start.state), loss(stop.state)
        for t in (0.3, 0.7):
            inside = loss(between(start.state, stop.state, t))
            if stop.kind == "rewrite":
                assert inside == pytest.approx(ends[0], abs=1e-12)
            else:
                assert inside <= (1 - t) * ends[0] + t * ends[1] + 1e-12


def changed(entries: list[EntryValue], how: str) -> list[EntryValue]:
    """Orders in which some move changes what is alive."""
    place = {entry.label: number for number, entry in enumerate(entries)}
    wrong = list(entries)
    if how == "the same half twice":
        wrong[place["v2"]] = replace(entries[place["v2"]], side=entries[place["u3"]].side)
    elif how == "a whole branch without its inner value":
        wrong[place["v1"]] = replace(entries[place["v1"]], zero=False)
    else:
        del wrong[place["v1"]]
        wrong = [replace(entry, side=number % 2) for number, entry in enumerate(wrong)]
    return wrong


@pytest.mark.parametrize(
    "how",
    ["the same half twice", "a whole branch without its inner value", "a level left out"],
)
def test_wrong_orders_are_refused(how: str) -> None:
    net, structure = recognised("residual")
    points = path("residual", changed(entries_of(net), how))

    def classified() -> list[str]:
        pairs = itertools.pairwise(point.state for point in points)
        return [structure.classify(*pair).kind for pair in pairs]

    with pytest.raises(ModeconnError, match=r"it is no rewrite, for .* is live"):
        classified()


# -- connected -------------------------------------------------------------------------------------


@functools.cache
def data() -> tuple[Tensor, Tensor]:
    """Three classes of images that differ in their means."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    means = torch.randn(3, 2, 6, 6, generator=generator)
    return means[labels] + 0.7 * torch.randn(120, 2, 6, 6, generator=generator), labels


@functools.cache
def trained(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model, (x, y) = Residual(blocks=1), data()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.eval().state_dict().items()}


@functools.cache
def connected() -> mc.Connection:
    return mc.connect(Residual(blocks=1), trained(1), trained(2), data(), target=0.3)


@pytest.mark.filterwarnings("ignore:batch norms")  # of the straight line
def test_two_residual_networks_are_connected_and_verified(tmp_path: Path) -> None:
    connection = connected()
    bound = connection.certificate.bound
    line = mc.evaluate(Residual(blocks=1), mc.Line(trained(1), trained(2)), data(), points=5)
    assert bound < min(0.5, line.loss.max())
    connection.save(tmp_path / "c")
    found = mc.verify(
        Residual(blocks=1),
        mc.Connection.load(tmp_path / "c"),
        data(),
        a=trained(1),
        b=trained(2),
    )
    assert found.same_data and found.bound == pytest.approx(bound, rel=1e-9)
    dense = mc.evaluate(Residual(blocks=1), connection.path, data(), points=120)
    assert dense.loss.max() <= bound + 1e-5


def test_a_false_breakpoint_is_refused() -> None:
    connection = connected()
    points = [dict(point) for point in connection.path.control_points]
    points[3]["body.0.conv1.weight"] = points[3]["body.0.conv1.weight"] + 0.01
    forged = mc.Connection(mc.PolyChain(points), connection.kinds, connection.certificate)
    with pytest.raises(mc.FalseCertificate, match="live"):
        mc.verify(Residual(blocks=1), forged, data())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One network after the other: with more threads both at a time, in no order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_search_goes_on_to_the_same_connection(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("v1 of b"):
            raise KeyboardInterrupt

    options = {"target": 0.3, "folder": tmp_path / "partial"}
    model = Residual(blocks=1)
    with pytest.raises(KeyboardInterrupt):
        mc.connect(model, trained(1), trained(2), data(), log=stop, **options)
    lines: list[str] = []
    again = mc.connect(model, trained(1), trained(2), data(), log=lines.append, **options)
    assert not any(line.startswith("v1 of a") and "loss" in line for line in lines[:3])
    for one, other in zip(again.path.control_points, connected().path.control_points):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_two_threads_find_the_same_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network has a thread; afterwards, and after Ctrl-C, there are as many as before."""
    before = torch.get_num_threads()
    model = Residual(blocks=1)
    try:
        torch.set_num_threads(1)
        alone = mc.connect(model, trained(1), trained(2), data(), target=0.3)
        torch.set_num_threads(2)
        found = mc.connect(model, trained(1), trained(2), data(), target=0.3)
        assert torch.get_num_threads() == 2
        for one, other in zip(found.path.control_points, alone.path.control_points):
            assert all(torch.equal(value, other[key]) for key, value in one.items())

        def interrupted(futures: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("modeconn.connection.residual.rounds.wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mc.connect(model, trained(1), trained(2), data(), target=0.3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_other_images_with_the_same_labels_are_another_search(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("v1 of b"):
            raise KeyboardInterrupt

    options = {"target": 0.3, "folder": tmp_path / "partial"}
    model, (x, y) = Residual(blocks=1), data()
    with pytest.raises(KeyboardInterrupt):
        mc.connect(model, trained(1), trained(2), (x, y), log=stop, **options)
    with pytest.raises(ModeconnError, match="started with other data"):
        mc.connect(model, trained(1), trained(2), (x.flip(3), y), **options)


def test_what_has_no_path_is_refused_by_name() -> None:
    a = trained(1)
    for options, text in (
        ({"subnetworks": "head"}, "of chains of layers"),
        ({"kept": 0.4}, "kept is 0.4: expected 0.5 for a residual network"),
    ):
        with pytest.raises(ModeconnError, match=text):
            mc.connect(Residual(blocks=1), a, a, data(), **options)
    odd = Residual(width=3, blocks=1)
    with pytest.raises(ModeconnError, match=r"first\.weight has 3 channels: expected an even"):
        mc.connect(odd, odd, odd, data())


class PreActivation(nn.Module):
    """A stream that may be negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.first(x)))
        h = h + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(h)))))
        return self.last(h.mean((2, 3)))


def test_a_stream_that_may_be_negative_is_refused() -> None:
    model = PreActivation()
    with pytest.raises(ModeconnError, match=r"mean .* where a ReLU keeps the stream non-negative"):
        mc.connect(model, model, model, data())


def test_a_path_of_ones_own_is_certified_and_saved(tmp_path: Path) -> None:
    model = network("transformer").float()
    start = state_of(model)
    start["out.weight"][:, 4:8] = 0
    rewritten = {key: value.clone() for key, value in start.items()}
    rewritten["qkv.weight"][4:8] += 1
    swung = {**rewritten, "head.weight": -rewritten["head.weight"]}
    x, y = inputs("transformer", 12).float(), torch.arange(12) % 3
    made = mc.certify(model, mc.PolyChain([start, rewritten, swung]), (x, y), target=5.0)
    assert made.kinds == ("rewrite", "swing") and made.certificate.bound <= 5.0
    made.save(tmp_path / "own")
    found = mc.verify(model, mc.Connection.load(tmp_path / "own"), (x, y), target=5.0)
    assert found.bound == made.certificate.bound
    with pytest.raises(ModeconnError, match=r"segment 0 .* is not certified"):
        mc.certify(model, mc.PolyChain([state_of(network("transformer").float()), swung]), (x, y))
    with pytest.raises(ModeconnError, match="expected a PolyChain"):
        mc.certify(model, mc.Line(start, swung), (x, y))
