"""Models by name, and their initialisation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from modeconn import models
from modeconn.errors import ModeconnError
from modeconn.models import MLP, build, initialise


@pytest.mark.parametrize(
    ("spec", "widths", "activation"),
    [
        ("mlp:784-245x10-10", [784, *[245] * 10, 10], nn.ReLU),
        ("mlp:64-32-10", [64, 32, 10], nn.ReLU),
        ("mlp:5-3", [5, 3], nn.ReLU),
        ("mlp:8-4x2-16x1-3:tanh", [8, 4, 4, 16, 3], nn.Tanh),
        ("mlp:8-4-3:gelu", [8, 4, 3], nn.GELU),
    ],
)
def test_a_perceptron_has_the_layers_that_its_name_says(spec, widths, activation):
    model = build(spec)
    linear = [module for module in model if isinstance(module, nn.Linear)]
    between = [module for module in model if not isinstance(module, nn.Linear)]
    assert [layer.in_features for layer in linear] + [linear[-1].out_features] == widths
    assert len(between) == len(widths) - 2
    assert all(type(module) is activation for module in between)
    assert list(model.state_dict()) == [f"{2 * i}.{kind}" for i in range(len(linear)) for kind in ("weight", "bias")]


def test_a_perceptron_flattens_its_inputs():
    model = build("mlp:12-7-3")
    images = torch.randn(5, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = model[2](torch.relu(model[0](images.reshape(5, 12))))
    torch.testing.assert_close(model(images), expected)
    torch.testing.assert_close(model(images.reshape(5, 12)), expected)


@pytest.mark.parametrize("name", models.ACTIVATIONS)
def test_every_activation_is_one_of_torch(name):
    x = torch.linspace(-2, 2, 7)
    expected = getattr(torch.nn.functional, name)(x)
    torch.testing.assert_close(build(f"mlp:3-2-1:{name}")[1](x), expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "model '' is not known: expected mlp:IN"),
        ("resnet", "model 'resnet' is not known: expected mlp:IN"),
        ("mlp", "model 'mlp' is not known"),
        ("mlp:", "'' is not a width"),
        ("mlp:784", "has one width"),
        ("mlp:784-0-10", "'0' is not a width"),
        ("mlp:784-245x0-10", "'245x0' is not a width"),
        ("mlp:784-x3-10", "'x3' is not a width"),
        ("mlp:784--10", "'' is not a width"),
        ("mlp:784-24.5-10", "'24.5' is not a width"),
        ("mlp:784-٣-10", "'٣' is not a width"),
        ("mlp:784-10:swoosh", "activation 'swoosh' is not known, expected one of relu, tanh"),
        ("mlp:784-10:", "activation '' is not known"),
        ("mlp:784-999999x999999-10", "too large"),
        ("mlp:999999-999999-10", "1,000,009,000,000 parameters, expected at most"),
        ("no.such.module:factory", "cannot be imported: ModuleNotFoundError"),
        ("torch.nn:NoSuchName", "cannot be imported: AttributeError"),
        ("math:pi", "is float, expected a function or class"),
        ("torch.nn:Linear", "is called without arguments, but: missing a required argument: 'in_features'"),
        ("collections:OrderedDict", "returned OrderedDict, expected a torch.nn.Module"),
    ],
)
def test_a_bad_name_is_one_clear_line(spec, message):
    with pytest.raises(ModeconnError) as caught:
        build(spec)
    assert message in str(caught.value)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch):
    """A module of the user's in the current folder, which is not on sys.path, as for an installed command."""
    (tmp_path / "mine_for_test.py").write_text(
        "from torch import nn\n"
        "class Nets:\n"
        "    small = staticmethod(lambda width=4: nn.Sequential(nn.Linear(2, width), nn.Linear(width, 3)))\n"
        "def broken():\n"
        "    raise RuntimeError('first line\\nsecond line')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    yield
    sys.modules.pop("mine_for_test", None)


@pytest.mark.usefixtures("factories")
def test_a_factory_is_found_in_the_current_folder():
    before = list(sys.path)
    model = build("mine_for_test:Nets.small")
    assert model[0].out_features == 4
    assert sys.path == before


@pytest.mark.usefixtures("factories")
def test_a_factory_that_fails_is_named():
    with pytest.raises(ModeconnError, match="model 'mine_for_test:broken' failed: RuntimeError: first line") as caught:
        build("mine_for_test:broken")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_initialisation_is_he_normal_and_follows_the_seed():
    def drawn(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(400, 300), nn.BatchNorm1d(300), nn.Conv2d(8, 64, 3), nn.Linear(7, 5, bias=False))
        initialise(model, torch.Generator().manual_seed(seed))
        return model

    linear, norm, conv, small = drawn(1)
    for module, fan_in in ((linear, 400), (conv, 8 * 9)):
        weight = module.weight.detach()
        spread = (2 / fan_in) ** 0.5
        # Four standard errors of a mean and of a standard deviation of so many normal numbers.
        assert abs(float(weight.mean())) < 4 * spread / weight.numel() ** 0.5
        assert float(weight.std()) / spread == pytest.approx(1, abs=4 / (2 * weight.numel()) ** 0.5)
        assert not module.bias.any()
    assert bool((norm.weight == 1).all())
    assert small.weight.std() > 0
    again, other = drawn(1), drawn(2)
    assert torch.equal(again[0].weight, linear.weight)
    assert torch.equal(again[2].weight, conv.weight)
    assert not torch.equal(other[0].weight, linear.weight)


def test_initialisation_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    model = MLP([3, 2])
    torch.random.set_rng_state(before)
    initialise(model, torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)
