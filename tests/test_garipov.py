"""Garipov's curves against plain PyTorch by the rules of its scripts."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import garipov_cases as theirs
import modeconn as mc
from modeconn.dropin import garipov
from modeconn.parameters.length import Lengths


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(self.conv(x)).relu().flatten(1))


# A CurveNet's modules may have other names than its base model's, in the same order.
OTHER_NAMES = {"conv": "layer1.conv", "norm": "layer1.bn", "fc": "classifier"}


def build(seed: int) -> Base:
    torch.manual_seed(seed)
    net = Base()
    with torch.no_grad():
        net.norm.weight.uniform_(0.5, 1.5)
        net.norm.running_mean.normal_()
    return net.double()


NETS = [build(seed) for seed in range(3)]
BASE = build(7)


def loader(count: int, seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.arange(count) % 4), batch_size=8)


LOADERS = loader(21, 1), loader(13, 2)


@pytest.mark.parametrize("names", [None, OTHER_NAMES], ids=["equal names", "other names"])
@pytest.mark.parametrize("kind", ["Bezier", "PolyChain"])
def test_a_checkpoint_is_the_curve(kind, names, tmp_path):
    torch.save(theirs.checkpoint(NETS, kind, names), tmp_path / "checkpoint-3.pt")
    path = garipov.load_curve(tmp_path / "checkpoint-3.pt", BASE)
    assert type(path).__name__ == kind and len(path.control_points) == 3
    for point, net in zip(path.control_points, NETS):
        expected = net.state_dict()
        for name, _ in net.named_parameters():
            assert torch.equal(point[name], expected[name]), name
        assert torch.equal(point["norm.running_mean"], NETS[0].norm.running_mean)
    assert [*path.control_points[0]] == [*BASE.state_dict()]
    at = path.coefficients([0.3]).tolist()[0]
    assert at == pytest.approx(theirs.coefficients(kind, 3, 0.3))


def test_eval_curve_and_its_file(tmp_path):
    content = theirs.checkpoint(NETS, "Bezier", OTHER_NAMES)
    path = garipov.load_curve(content, BASE)
    before = copy.deepcopy(BASE.state_dict())
    got = garipov.eval_curve(
        BASE, path, *LOADERS, tmp_path / "curve.npz", num_points=5, wd=0.01, precision="float64"
    )
    expected = theirs.eval_curve(BASE, content["model_state"], "Bezier", LOADERS, 5, 0.01)
    with np.load(tmp_path / "curve.npz") as file:
        assert sorted(file.files) == sorted(expected) == sorted(got)
        for name in expected:
            np.testing.assert_allclose(file[name], expected[name], rtol=1e-9, atol=1e-12)
            np.testing.assert_array_equal(file[name], got[name])
    assert all(torch.equal(before[name], value) for name, value in BASE.state_dict().items())


def test_each_data_set_is_read_once_more_than_statistics_need(monkeypatch):
    path = mc.PolyChain(NETS)
    passes = {"train": 0, "test": 0}

    class Counted:
        def __init__(self, name: str, loader: DataLoader) -> None:
            self.name, self.loader, self.batch_size = name, loader, 8

        def __iter__(self):
            passes[self.name] += 1
            return iter(self.loader)

    sets = [Counted(name, each) for name, each in zip(passes, LOADERS)]
    garipov.eval_curve(BASE, path, *sets, num_points=3)
    assert passes == {"train": 2, "test": 1}


def test_plane_and_its_file(tmp_path):
    path = mc.PolyChain(NETS)
    margins = (0.3, 0.1, 0.0, 0.2)
    got = garipov.plane(
        BASE,
        path,
        *LOADERS,
        tmp_path / "plane.npz",
        grid_points=3,
        margins=margins,
        curve_points=7,
        wd=0.01,
        precision="float64",
    )
    expected = theirs.plane(BASE, NETS, "PolyChain", LOADERS, 3, margins, 0.01)
    with np.load(tmp_path / "plane.npz") as file:
        assert sorted(file.files) == sorted(expected) == sorted(got)
        for name in expected:
            np.testing.assert_allclose(file[name], expected[name], rtol=1e-8, atol=1e-10)


def test_a_script_with_one_import_changed(tmp_path):
    """It evaluates a checkpoint and draws `curve.npz`: the same numbers are in the figure."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    torch.save(theirs.checkpoint(NETS, "PolyChain"), tmp_path / "checkpoint.pt")

    def script(evaluated) -> list[np.ndarray]:
        np.savez(tmp_path / "curve.npz", **evaluated(tmp_path / "checkpoint.pt"))
        with np.load(tmp_path / "curve.npz") as file:
            axes = Figure().subplots()
            axes.plot(np.cumsum(file["dl"]), file["tr_nll"])
            axes.plot(np.cumsum(file["dl"]), file["te_err"])
            axes.axhline(float(file["te_err_int"]))
        return [line.get_xydata() for line in axes.get_lines()]

    def original(file: Path) -> dict[str, np.ndarray]:
        state = torch.load(file)["model_state"]
        return theirs.eval_curve(BASE, state, "PolyChain", LOADERS, 4, 1e-4)

    def ours(file: Path) -> dict[str, np.ndarray]:
        return garipov.eval_curve(BASE, garipov.load_curve(file, BASE), *LOADERS, num_points=4)

    for one, other in zip(script(ours), script(original), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_lengths_of_near_networks_keep_their_digits():
    """Two networks a millionth apart: the distance is that of the differences."""
    a = {
        "w": torch.randn(50, generator=torch.Generator().manual_seed(0)).double(),
        "b": NETS[0].fc.bias.detach(),
    }
    b = {"w": a["w"] + 1e-6, "b": a["b"] + 1e-6}
    lengths = Lengths(mc.Line(a, b), ["w"])
    np.testing.assert_allclose(lengths.steps([0.0, 0.5, 1.0])[1:], 0.5e-6 * 50**0.5, rtol=1e-6)
    both = Lengths(mc.Line(a, b), ["w", "b"])
    assert both.squares([0.0])[0] == pytest.approx(float((a["w"] ** 2).sum() + (a["b"] ** 2).sum()))
    assert both.norms([0.0])[0] == pytest.approx(float(a["w"].norm() + a["b"].norm()))
    plane = Lengths(mc.Plane(a, b, {"w": torch.ones(50).double()}), ["w"])
    t = [[0.0, 0.0], [2.0, -3.0]]
    moved = 2 * b["w"] - 3
    assert plane.steps(t)[1] == pytest.approx(float(moved.norm()))
    assert plane.squares(t)[1] == pytest.approx(float((a["w"] + moved).square().sum()))


def test_old_checkpoints_have_no_counters_of_batches():
    content = theirs.checkpoint(NETS, "Bezier")
    del content["model_state"]["net.norm.num_batches_tracked"]
    path = garipov.load_curve(content, BASE)
    assert path.control_points[0]["norm.num_batches_tracked"].item() == 0


def without(name: str) -> dict:
    content = theirs.checkpoint(NETS, "Bezier")
    content["model_state"] = {k: v for k, v in content["model_state"].items() if name not in k}
    return content


@pytest.mark.parametrize(
    "says, content, model",
    [
        ("'fc.weight' is [3, 48], and 'net.fc.weight' is [4, 48]", without("#"), "narrow"),
        ("the model has 2 parameters, and the checkpoint 5", without("#"), "linear"),
        ("lacks 'net.fc.bias_1': expected 3 copies of each", without("fc.bias_1"), "base"),
        ("the model has 5 parameters, and the checkpoint 4", without("fc.bias"), "base"),
        ("the model has 3 buffers, and the checkpoint 2", without("running_var"), "base"),
        ("has no coeff_layer.*: it is no CurveNet's", without("coeff_layer"), "base"),
        ("has no coeff_layer.*", NETS[0].state_dict(), "base"),
    ],
)
def test_a_checkpoint_that_does_not_fit(says, content, model):
    narrow = build(0)
    narrow.fc = nn.Linear(48, 3)
    models = {"narrow": narrow, "linear": nn.Linear(2, 2), "base": BASE}
    with pytest.raises(mc.ModeconnError) as error:
        garipov.load_curve(content, models[model])
    assert says in str(error.value)


def test_other_refusals():
    with pytest.raises(mc.ModeconnError, match="curve is 'Spline': expected Bezier or PolyChain"):
        garipov.load_curve(without("#"), BASE, "Spline")
    with pytest.raises(mc.ModeconnError, match=r"has no names such as net.fc.weight_0"):
        garipov.load_curve(NETS[0].state_dict(), BASE, "Bezier")
    with pytest.raises(mc.ModeconnError, match="path has 2 control points: expected at least 3"):
        garipov.plane(BASE, mc.Line(*NETS[:2]), *LOADERS)
    middle = mc.Line(*NETS[:2]).at(0.5)
    with pytest.raises(mc.ModeconnError, match="lie on one line"):
        garipov.plane(BASE, mc.PolyChain([NETS[0], middle, NETS[1]]), *LOADERS)
    with pytest.raises(mc.ModeconnError, match="path has 2 coordinates and num_points is 61"):
        garipov.eval_curve(BASE, mc.Plane.through(*NETS), *LOADERS)
