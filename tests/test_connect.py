"""Two trained networks connected: bounds that hold everywhere, the command line, refusals."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import modeconn as mc
from modeconn import models
from modeconn.cli import main
from modeconn.connection.certificate import Outcome
from modeconn.connection.features import compute_features
from modeconn.connection.layer_chain import LayerChain
from modeconn.parameters import state
from modeconn.training.train import train
from naive import mlp

training = importlib.import_module("modeconn.connection.training")

SPEC = "mlp:64-40-44-40-10"


def digits(split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    x, y = mc.datasets.load("digits", split=split).slice(0, 10_000)
    return x, y


def trained(spec: str, seed: int, epochs: int = 25) -> nn.Module:
    torch.manual_seed(seed)
    model = models.build(spec)
    models.initialise(model, torch.Generator().manual_seed(seed))
    train(model, digits(), lr=0.02, momentum=0.9, batch_size=50, epochs=epochs, seed=seed)
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    return trained(SPEC, 1), trained(SPEC, 2)


@pytest.fixture(scope="module")
def connection(pair) -> mc.Connection:
    return mc.connect(pair[0], *pair, digits(), target=0.03, test=digits("test"))


def test_the_bound_holds_at_random_points(pair, connection) -> None:
    certificate = connection.certificate
    assert certificate.outcome is Outcome.CERTIFIED
    assert certificate.bound <= 0.03
    assert len(connection.kinds) == 4 * 4 - 1
    for end, network in zip((0, -1), pair):
        weights = network.state_dict()
        assert all(
            torch.equal(connection.path.control_points[end][key], weights[key]) for key in weights
        )
    t = np.random.default_rng(0).random(600)
    for data, proved in ((digits(), certificate), (digits("test"), connection.test_certificate)):
        result = mc.evaluate(pair[0], connection.path, data, points=t)
        assert result.loss.max() <= proved.bound * (1 + 1e-5)
        assert result.error.max() <= proved.error_bound + 1e-9
        assert result.passes == 1
    line = mc.evaluate(pair[0], mc.Line(*pair), digits(), points=21)
    assert line.loss.max() > 10 * certificate.bound  # what the path goes around


def test_cost_of_the_path_does_not_depend_on_its_points(pair, connection) -> None:
    x = digits()[0][:8]
    few, many = (
        mc.explain(pair[0], connection.path, x, points=15 * n + 1).program for n in (10, 1000)
    )
    assert many.shared_flops == few.shared_flops
    assert many.shared_flops <= 8 * many.naive_flops


def test_verified_and_the_same_again(pair, connection, tmp_path: Path) -> None:
    first, again = (mc.connect(pair[0], *pair, digits(), target=1.0, seed=5) for _ in range(2))
    points = zip(first.path.control_points, again.path.control_points)
    assert all(torch.equal(p[key], q[key]) for p, q in points for key in p)
    connection.save(tmp_path / "c")
    loaded = mc.Connection.load(tmp_path / "c")
    assert mc.verify(pair[0], loaded, digits()).same_data
    assert loaded.details["found"] == connection.details["found"]


@pytest.mark.parametrize("subnetworks", ["readout", "trained"])
def test_other_subnetworks(pair, subnetworks: str) -> None:
    found = mc.connect(pair[0], *pair, digits(), target=0.2, subnetworks=subnetworks)
    assert {record["method"] for record in found.details["found"]} == {subnetworks}
    assert found.certificate.bound < 0.4
    mc.verify(pair[0], found, digits())


def test_uneven_kept_parts(pair) -> None:
    found = mc.connect(pair[0], *pair, digits(), kept=[0.4, 0.6, 0.5], target=0.5)
    assert [record["kept"] for record in found.details["found"][:4]] == [64, 16, 26, 20]
    assert found.certificate.bound < 0.6


def test_networks_that_are_no_solutions_make_the_bound() -> None:
    a, b = mlp(64, 40, 40, 10, seed=1), mlp(64, 40, 40, 10, seed=2)
    x, y = (part[:300] for part in digits())
    found = mc.connect(a, a, b, (x.flatten(1), y))
    assert found.certificate.bound <= 2.1 * max(
        found.certificate.losses[0], found.certificate.losses[-1]
    )
    below = mc.connect(a, a, b, (x.flatten(1), y), target=0.5)
    assert below.certificate.outcome in (Outcome.ENDS, Outcome.ABOVE_ENDS)
    assert "end" in below.certificate.advice


def test_tanh_is_connected_by_trained_subnetworks_and_refused_for_heads() -> None:
    spec = "mlp:64-30-30-10:tanh"
    a, b = trained(spec, 1, 15), trained(spec, 2, 15)
    with pytest.raises(
        mc.ModeconnError, match=r'"head" .* tanh, which carries no numbers; .* do; use "trained"'
    ):
        mc.connect(a, a, b, digits(), subnetworks="head")
    found = mc.connect(a, a, b, digits(), target=0.2)
    assert {record["method"] for record in found.details["found"]} == {"trained"}
    assert mc.verify(a, found, digits()).bound == pytest.approx(found.certificate.bound)


def test_convolutions_with_norms() -> None:
    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [
            nn.Conv2d(8, 12, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
        ]
        model = nn.Sequential(*layers, nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 10))
        train(model, digits(), lr=0.02, momentum=0.9, batch_size=50, epochs=4, seed=seed)
        return model.eval()

    a, b = net(1), net(2)
    found = mc.connect(a, a, b, digits(), target=1.2)
    assert len(found.kinds) == 15
    assert mc.verify(a, found, digits(), a=a.state_dict(), b=b.state_dict()).bound <= 1.2


@pytest.fixture(scope="module")
def small_pair() -> tuple[nn.Module, nn.Module]:
    """Two networks of three layers: searches between them are short, with fits to interrupt."""
    return trained("mlp:64-20-22-10", 1, 15), trained("mlp:64-20-22-10", 2, 15)


@pytest.mark.parametrize("subnetworks", ["head", "trained"])
def test_an_interrupted_search_goes_on_to_the_same_connection(
    small_pair, tmp_path: Path, monkeypatch, subnetworks: str
) -> None:
    pair = small_pair
    data = tuple(part[:300] for part in digits())
    settings = {"target": 0.2, "subnetworks": subnetworks, "seed": 3}
    whole = mc.connect(pair[0], *pair, data, **settings)
    folder = tmp_path / "search"
    lines = 0
    for stop in (1, 2):  # at once, and after some fits

        def interrupt(line: str, stop: int = stop) -> None:
            nonlocal lines
            lines += line.startswith("round")
            if lines == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            mc.connect(pair[0], *pair, data, **settings, folder=folder, log=interrupt)
        lines = 0
    assert list(folder.glob("fit-*.safetensors"))
    with monkeypatch.context() as broken:  # in the middle of a training
        epochs = 0

        def run_epoch(self, run=training._Training.run_epoch) -> None:
            nonlocal epochs
            epochs += 1
            if epochs == 4:
                raise KeyboardInterrupt
            run(self)

        broken.setattr(training._Training, "run_epoch", run_epoch)
        broken.setattr("modeconn.resuming.SECONDS_BETWEEN_WRITES", 0.0)
        with pytest.raises(KeyboardInterrupt):
            mc.connect(pair[0], *pair, data, **settings, folder=folder)
    assert list(folder.glob("fit-*.training"))
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("fit-*.safetensors")}
    again = mc.connect(pair[0], *pair, data, **settings, folder=folder)
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())
    points = zip(whole.path.control_points, again.path.control_points, strict=True)
    assert all(torch.equal(p[key], q[key]) for p, q in points for key in p)
    assert [f["epochs"] for f in again.details["found"]] == [
        f["epochs"] for f in whole.details["found"]
    ]
    with pytest.raises(
        mc.ModeconnError,
        match="holds another search, started with other kept; other features; seed 3, not 4",
    ):
        mc.connect(pair[0], *pair, data, **{**settings, "seed": 4}, folder=folder)
    with pytest.raises(mc.ModeconnError, match="started with other networks"):
        mc.connect(pair[0], pair[1], pair[0], data, **settings, folder=folder)
    fit = next(iter(sorted(folder.glob("fit-*.safetensors"))))
    fit.write_bytes(fit.read_bytes()[:100])
    with pytest.raises(mc.ModeconnError, match="is no finished fit"):
        mc.connect(pair[0], *pair, data, **settings, folder=folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(mc.ModeconnError, match="holds no search"):
        mc.connect(pair[0], *pair, data, folder=tmp_path / "mine")


def test_features_are_those_of_the_network(pair, tmp_path: Path) -> None:
    x, y = digits()
    chain = LayerChain.of(pair[0], x[:4])
    weights = pair[0].state_dict()
    with torch.no_grad():
        kept = {2: torch.tensor([1, 5])}
        memory = compute_features(chain, weights, (x, y), kept=kept)
        disk = compute_features(chain, weights, (x, y), memory_budget=1000, folder=tmp_path)
        assert disk.on_disk
        assert not memory.on_disk
        for entry in range(chain.length):
            expected = chain.run(weights, x, 0, entry)
            torch.testing.assert_close(disk.entry(entry), expected)
            torch.testing.assert_close(
                memory.entry(entry), expected[:, [1, 5]] if entry == 2 else expected
            )
    assert torch.equal(disk.labels, y)
    with pytest.raises(mc.ModeconnError, match="entry layer 4: MLP has entry layers 0 to 3"):
        compute_features(chain, weights, (x, y), [4])


def test_bad_input_is_named(pair) -> None:
    a, b = pair
    x, y = digits()
    with pytest.raises(
        mc.ModeconnError, match="all 1,437 samples have the label 0: expected at least two classes"
    ):
        mc.connect(a, a, b, (x[:1437], torch.zeros(1437, dtype=torch.int64)))
    with pytest.raises(
        mc.ModeconnError,
        match=r"subnetworks is 'best': expected one of auto, readout, head, trained",
    ):
        mc.connect(a, a, b, (x, y), subnetworks="best")
    with pytest.raises(mc.ModeconnError, match=r"kept is 1\.5 for layer 1 of 40 units"):
        mc.connect(a, a, b, (x, y), kept=1.5)
    with pytest.raises(mc.ModeconnError, match="kept has 2 numbers"):
        mc.connect(a, a, b, (x, y), kept=[0.5, 0.5])
    with pytest.raises(mc.ModeconnError, match="target is 0: expected a positive loss"):
        mc.connect(a, a, b, (x, y), target=0)
    broken = {key: value.clone() for key, value in b.state_dict().items()}
    broken["2.weight"][3, 4] = torch.nan
    with pytest.raises(mc.ModeconnError, match=r"b.*2\.weight"):
        mc.connect(a, a, broken, (x, y))
    with pytest.raises(mc.ModeconnError):
        mc.connect(a, a, mlp(64, 20, 10), (x, y))
    with pytest.raises(mc.ModeconnError, match="data"):
        mc.connect(a, a, b, (x[:0], y[:0]))
    with pytest.raises(mc.ModeconnError, match="train is None: expected the data"):
        mc.connect(a, a, b)
    with pytest.raises(mc.ModeconnError, match="a is one network, and b None: expected two"):
        mc.connect(a, a, train=(x, y))
    net = models.build("vit:width=16,layers=1,heads=2,patch=8")
    with pytest.raises(mc.ModeconnError, match="is not a chain of layers that can be connected"):
        mc.connect(net, net, net, (torch.randn(20, 3, 32, 32), torch.arange(20) % 10))


def test_from_the_command_line(pair, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, network in zip("ab", pair):
        state.save(network.state_dict(), f"{name}.safetensors", {"model": SPEC})
    ends = ("a.safetensors", "b.safetensors")
    arguments = [
        "connect",
        *ends,
        "--data",
        "digits",
        "--target",
        "0.3",
        "--out",
        "c",
        "--json",
        "c.json",
        "--plot",
        "c.png",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "loss at most" in printed
    assert "S_0 " in printed
    content = json.loads(Path("c.json").read_text())
    assert content["certificate"]["bound"] <= 0.3
    assert not Path("c.partial").exists()
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    assert main(["verify", "c", "--data", "digits", "--a", ends[0], "--b", ends[1]]) == 0
    assert "bear out the certificate" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "exists: expected the name of a new folder" in capsys.readouterr().err
