"""Landscaper's function against plain PyTorch by its rules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import modeconn as mc
from landscaper_cases import conv, cross_entropy, data, directions, landscape, mlp, over_batches
from modeconn.dropin import landscaper
from modeconn.dropin.landscaper import MeanLoss, compute_loss_landscape, save_landscape

KINDS = ["cross-entropy", "greatest logit", "mean loss"]
MODELS = {"mlp": (mlp(), 6), "conv": (conv(), 4)}


@pytest.mark.parametrize("dim, steps", [(1, 7), (2, 4), (3, 3)])
@pytest.mark.parametrize("fn", [cross_entropy, over_batches, MeanLoss()], ids=KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_values_and_coordinates(name, fn, dim, steps):
    model, width = MODELS[name]
    before = copy.deepcopy(model.state_dict())
    dirs = directions(model, 3)
    kept = copy.deepcopy(dirs)
    loss, coordinates = compute_loss_landscape(
        model, data(width), dirs, fn, steps=steps, distance=0.5, dim=dim, device="cpu"
    )
    plain = cross_entropy if isinstance(fn, MeanLoss) else fn
    expected = landscape(copy.deepcopy(model), data(width), dirs, plain, steps, 0.5, dim)
    np.testing.assert_allclose(loss, expected, rtol=2e-5)
    assert loss.shape == (steps,) * dim and len(coordinates) == dim
    np.testing.assert_array_equal(coordinates[0], np.linspace(-0.5, 0.5, steps))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for one, two in zip(dirs, kept) for a, b in zip(one, two))


def test_the_middle_is_the_model_itself():
    model, width = MODELS["mlp"]
    loss, _ = compute_loss_landscape(
        model, data(width), directions(model, 2), cross_entropy, steps=5, dim=2, distance=3.0
    )
    assert loss[2, 2] == pytest.approx(cross_entropy(model, data(width)), rel=1e-6)
    assert loss.argmin() == 12 or loss.std() > 0


def test_a_known_loss_takes_one_pass_and_any_other_none_of_its_own(monkeypatch):
    model, width = MODELS["mlp"]
    calls: list[str] = []
    for name in ("evaluate", "at_each_point"):
        original = getattr(landscaper, name)
        monkeypatch.setattr(
            landscaper, name, lambda *a, f=original, n=name, **k: calls.append(n) or f(*a, **k)
        )
    options = {"steps": 3, "dim": 1}
    compute_loss_landscape(model, data(width), directions(model, 1), MeanLoss(), **options)
    compute_loss_landscape(model, data(width), directions(model, 1), cross_entropy, **options)
    training = copy.deepcopy(model).train()
    compute_loss_landscape(training, data(width), directions(model, 1), MeanLoss(), **options)
    assert calls == ["evaluate", "at_each_point", "at_each_point"]


def test_a_mean_loss_is_a_function_too():
    model, width = MODELS["conv"]
    x, y = data(width)
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    expected = cross_entropy(model, (x, y))
    assert MeanLoss()(model, loader) == pytest.approx(expected, rel=1e-6)
    assert MeanLoss(nn.CrossEntropyLoss())(model, (x, y)) == pytest.approx(expected, rel=1e-6)
    got = MeanLoss("mse")(model, (x, torch.zeros(20, 3)))
    assert got == pytest.approx(model(x).square().mean().item(), rel=1e-6)


def test_complex_directions_move_by_their_real_part():
    model, width = MODELS["mlp"]
    dirs = directions(model, 1, complex_=True)
    with pytest.raises(mc.ModeconnError, match="is complex: expected real tensors, or use_complex"):
        compute_loss_landscape(model, data(width), dirs, cross_entropy, dim=1)
    real = [[d.real.to(torch.complex64) for d in dirs[0]]]
    options = {"steps": 5, "dim": 1, "distance": 1.0}
    got, _ = compute_loss_landscape(
        model, data(width), real, cross_entropy, use_complex=True, **options
    )
    expected, _ = compute_loss_landscape(
        model, data(width), [[d.real for d in dirs[0]]], cross_entropy, **options
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_values_that_are_not_finite():
    model, width = MODELS["mlp"]
    values = iter([1.0, float("nan"), float("inf"), 3.0, -float("inf")])
    with pytest.warns(RuntimeWarning, match="is not finite at 3 of 5 points"):
        loss, _ = compute_loss_landscape(
            model, data(width), directions(model, 1), lambda m, d: next(values), steps=5, dim=1
        )
    assert loss.tolist() == [1.0, 2.0, 3.0, 3.0, 1.0]
    with pytest.raises(ValueError, match="finite at none of the points"):
        compute_loss_landscape(
            model, data(width), directions(model, 1), lambda m, d: float("nan"), steps=2, dim=1
        )


def test_a_script_with_one_import_changed(tmp_path):
    """It computes, keeps and draws a landscape: the same contours."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    model, width = MODELS["mlp"]

    def script(compute) -> list[np.ndarray]:
        dirs = directions(model, 2)
        loss, coordinates = compute(
            model, data(width), dirs, cross_entropy, steps=5, distance=1.0, dim=2, device="cpu"
        )
        save_landscape(tmp_path / "landscape.npz", loss, coordinates)
        with np.load(tmp_path / "landscape.npz") as file:
            assert file["coordinates"].shape == (2, 5)
            lines = Figure().subplots().contour(*file["coordinates"], file["loss"])
        return [path.vertices for path in lines.get_paths() if len(path.vertices)]

    def original(model, data, dirs, fn, steps, distance, dim, device):
        values = landscape(copy.deepcopy(model), data, dirs, fn, steps, distance, dim)
        return values, [np.linspace(-distance, distance, steps)] * dim

    for one, other in zip(script(compute_loss_landscape), script(original), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize(
    "says, change",
    [
        ("dim is 3, and there are 2 directions", {"dim": 3}),
        ("steps is 0: expected a whole number", {"steps": 0}),
        ("has 1 tensors: expected 4, one for each parameter of Seq", {"dirs": [[torch.ones(2)]]}),
        ("a direction is zero", {"dirs": [[torch.zeros_like(p) for p in mlp().parameters()]]}),
        (
            "a direction has shape [8] for '0.weight': expected [8, 6]",
            {"dirs": [[torch.ones(8), *list(mlp().parameters())[1:]]]},
        ),
    ],
)
def test_refused(says, change):
    model, width = MODELS["mlp"]
    given = {"dirs": directions(model, 2), "dim": 1, "steps": 3} | change
    with pytest.raises(mc.ModeconnError) as error:
        compute_loss_landscape(model, data(width), scalar_fn=cross_entropy, **given)
    assert says in str(error.value)


def test_files_that_landscaper_could_not_read(tmp_path):
    with pytest.raises(mc.ModeconnError, match=r"must end in \.npz"):
        save_landscape(tmp_path / "l.json", np.zeros((2, 2)), [np.zeros(2)] * 2)
    with pytest.raises(mc.ModeconnError, match=r"coordinates have \[2\] values: expected \[2, 3\]"):
        save_landscape(tmp_path / "l.npz", np.zeros((2, 3)), [np.zeros(2)])
    assert not [*tmp_path.iterdir()]


def test_an_exception_names_the_point():
    model, width = MODELS["mlp"]

    def fails(model, data):
        raise RuntimeError("no such loss")

    with pytest.raises(RuntimeError, match="no such loss"):
        compute_loss_landscape(model, data(width), directions(model, 1), fails, steps=3, dim=1)
