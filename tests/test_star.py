"""Many networks through one hub: all pairs certified, at a cost linear in their number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import modeconn as mc
from modeconn.cli import main
from modeconn.connection.hub import named, verify_star
from modeconn.connection.verification import certify
from modeconn.parameters import state
from naive import mlp

K = 5
SPEC = "mlp:64-24-20-10"


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = mc.datasets.load("digits", split="train").slice(0, 300)
    return x.flatten(1), y


def fitted(seed: int) -> nn.Sequential:
    x, y = digits()
    model = mlp(64, 24, 20, 10, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def networks() -> list[nn.Sequential]:
    return [fitted(seed) for seed in range(K)]


@pytest.fixture(scope="module")
def passes() -> list[int]:
    """Counts the passes that certify paths."""
    return []


@pytest.fixture(scope="module")
def star(networks, passes) -> mc.Star:
    def counted(model, chain, path, *rest, **options):
        passes.append(path.segments)
        return certify(model, chain, path, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeconn.connection.certifying.certificate_of", counted)
        return mc.connect(networks[0], networks, train=digits(), target=0.3)


def test_ten_pairs_from_five_descents(networks, star, passes) -> None:
    layers = 3
    assert passes == [2 * layers - 1] * K
    assert len(star.pairs) == K * (K - 1) // 2 == 10
    for (first, second), connection in star.connections():
        assert len(connection.kinds) == 4 * layers - 1
        for end, name in ((0, first), (-1, second)):
            own = networks[star.names.index(name)].state_dict()
            point = connection.path.control_points[end]
            assert all(torch.equal(point[key], own[key]) for key in own)
        assert connection.certificate.bound <= star.bound <= 0.3
        # What is put together from two descents is what a pass over the whole path finds.
        found = mc.verify(networks[0], connection, digits())
        assert found.bound == pytest.approx(connection.certificate.bound, rel=1e-5)
        assert found.error_bound == connection.certificate.error_bound
    assert star.bound == max(each.certificate.bound for _, each in star.connections())


def test_the_bound_of_a_pair_holds_between_breakpoints(networks, star) -> None:
    pair = star.connection(1, "d")
    t = np.random.default_rng(0).random(300)
    result = mc.evaluate(networks[0], pair.path, digits(), points=t)
    assert result.loss.max() <= pair.certificate.bound * (1 + 1e-5)
    assert result.error.max() <= pair.certificate.error_bound + 1e-9
    line = mc.evaluate(networks[0], mc.Line(networks[1], networks[3]), digits(), points=21)
    assert line.loss.max() > 3 * pair.certificate.bound


def test_saved_loaded_and_verified(networks, star, tmp_path: Path) -> None:
    star.save(tmp_path / "star")
    loaded = mc.Star.load(tmp_path / "star")
    assert loaded.names == star.names == ("a", "b", "c", "d", "e")
    assert loaded.details == star.details
    assert loaded.connection(0, 4).certificate == star.connection(0, 4).certificate
    found = verify_star(networks[0], loaded, digits(), {"a": networks[0]})
    assert max(each.bound for each in found.values()) == pytest.approx(star.bound, rel=1e-5)
    with pytest.raises(mc.FalseCertificate, match="descent of b: the path does not end in a"):
        verify_star(networks[0], loaded, digits(), {"b": networks[0]})
    with pytest.raises(mc.ModeconnError, match="exists: expected the name of a new folder"):
        star.save(tmp_path / "star")
    content = json.loads((tmp_path / "star" / "star.json").read_text())
    content["joins"][0]["moved"] = []
    (tmp_path / "star" / "star.json").write_text(json.dumps(content))
    with pytest.raises(mc.FalseCertificate, match="join of a and b"):
        verify_star(networks[0], mc.Star.load(tmp_path / "star"), digits())
    content["networks"][0] = "../a"
    (tmp_path / "star" / "star.json").write_text(json.dumps(content))
    with pytest.raises(mc.ModeconnError, match="is no name of a network"):
        mc.Star.load(tmp_path / "star")
    shutil.rmtree(tmp_path / "star" / "c")
    (tmp_path / "star" / "star.json").unlink()
    with pytest.raises(mc.ModeconnError, match="no star of connections"):
        mc.Star.load(tmp_path / "star")


def test_hubs_of_other_networks_are_no_join(networks, star) -> None:
    other = mc.connect(networks[0], networks[3:], train=digits(), target=1.0, seed=1)
    mixed = mc.Star({"a": star.descents["a"], "b": other.descents["b"]}, star.joins)
    with pytest.raises(mc.FalseCertificate, match=r"the function is not constant|the same hub"):
        verify_star(networks[0], mixed, digits())


def test_drawn(star) -> None:
    pytest.importorskip("matplotlib").use("Agg")
    axes = star.plot()
    texts = [text.get_text() for text in axes.texts]
    assert sum(text.startswith(tuple(f"{name}\n" for name in star.names)) for text in texts) == K
    assert "10 pairs" in axes.get_title()


def test_bad_input_is_named(networks, star) -> None:
    model = networks[0]
    with pytest.raises(
        mc.ModeconnError, match="c does not match the model Sequential in 5 entries"
    ):
        mc.connect(model, [*networks[:2], mlp(64, 30, 21, 10)], train=digits())
    with pytest.raises(mc.ModeconnError, match="networks are 1: expected at least two"):
        mc.connect(model, networks[:1], train=digits())
    with pytest.raises(mc.ModeconnError, match="a is a list of networks, and b is given, too"):
        mc.connect(model, networks[:2], networks[2], digits())
    with pytest.raises(mc.ModeconnError, match="network is 'z': expected one of a, b, c, d, e"):
        star.connection("a", "z")
    with pytest.raises(mc.ModeconnError, match="network a is given twice"):
        star.connection("a", 0)
    with pytest.raises(mc.ModeconnError, match="expected at least two descents"):
        mc.Star({"a": star.descents["a"]}, {})
    assert list(named(range(28)))[25:] == ["z", "n27", "n28"]


def test_from_the_command_line(networks, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name, network in zip("abc", networks):
        weights = {f"{key}": value for key, value in network.state_dict().items()}
        state.save(weights, f"{name}.safetensors", {"model": SPEC})
    files = [f"{name}.safetensors" for name in "abc"]
    options = ["--data", "digits", "--target", "0.5", "--out", "s", "--plot", "s.png"]
    assert main(["connect", *files, *options, "--json", "s.json"]) == 0
    printed = capsys.readouterr().out
    assert "3 networks, 3 pairs" in printed
    assert json.loads(Path("s.json").read_text())["networks"] == ["a", "b", "c"]
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")
    assert main(["verify", "s", "--data", "digits", "--a", files[0]]) == 0
    assert "bear out the certificate" in capsys.readouterr().out
    assert main(["verify", "s", "--data", "digits", "--split", "test"]) in (2, 3)
    assert main(["verify", "s", "--data", "digits", "--b", files[0]]) == 2
    assert "descent of b" in capsys.readouterr().err
    assert main(["connect", files[0], "--data", "digits", "--out", "t"]) == 2
    assert "expected two networks or more" in capsys.readouterr().err
