"""Models by name, and their initialisation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import modeconn as mc
from modeconn import models
from modeconn.errors import ModeconnError
from modeconn.models import MLP, ViT, build, initialise


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
    assert list(model.state_dict()) == [
        f"{2 * i}.{kind}" for i in range(len(linear)) for kind in ("weight", "bias")
    ]


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
        ("mlp:784-10:swoosh", "activation 'swoosh' is not known: expected one of relu, tanh"),
        ("mlp:784-10:", "activation '' is not known"),
        ("mlp:784-999999x999999-10", "too large"),
        ("mlp:999999-999999-10", "1,000,009,000,000 parameters: expected at most"),
        ("no.such.module:factory", "cannot be imported: ModuleNotFoundError"),
        ("torch.nn:NoSuchName", "cannot be imported: AttributeError"),
        ("math:pi", "is float: expected a function or class"),
        (
            "torch.nn:Linear",
            "is called without arguments, but: missing a required argument: 'in_features'",
        ),
        ("collections:OrderedDict", "returned OrderedDict: expected a torch.nn.Module"),
    ],
)
def test_a_bad_name_is_one_clear_line(spec, message):
    with pytest.raises(ModeconnError) as caught:
        build(spec)
    assert message in str(caught.value)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vgg11_fits_the_trained_checkpoints(shared):
    """Bitwise what they hold; tests/test_real.py evaluates them on real images."""
    model = build("vgg11:width=16")
    model.load_state_dict(mc.load(shared / "checkpoints" / "cifar10-vgg11-w16-seed1.safetensors"))


# From torchvision's documentation of each network: the number of parameters, and some of their
# names and shapes.
TORCHVISION = [
    (
        "vgg11",
        132_863_336,
        {
            "features.0.weight": [64, 3, 3, 3],
            "features.18.bias": [512],
            "classifier.6.bias": [1000],
        },
    ),
    (
        "vgg11_bn",
        132_868_840,
        {"features.1.running_mean": [64], "features.25.weight": [512, 512, 3, 3]},
    ),
    (
        "vgg16_bn",
        138_365_992,
        {"features.41.running_var": [512], "classifier.3.weight": [4096, 4096]},
    ),
    (
        "resnet18",
        11_689_512,
        {"layer2.0.downsample.0.weight": [128, 64, 1, 1], "fc.weight": [1000, 512]},
    ),
    (
        "resnet50",
        25_557_032,
        {"conv1.weight": [64, 3, 7, 7], "layer4.2.conv3.weight": [2048, 512, 1, 1]},
    ),
]


@pytest.mark.parametrize(
    ("name", "parameters", "some"), TORCHVISION, ids=[name for name, *_ in TORCHVISION]
)
def test_networks_of_the_imagenet_form_are_those_of_torchvision(name, parameters, some):
    with torch.device("meta"):
        model = build(f"{name}:form=imagenet")
        wide, slim = (build(f"{name}:form=imagenet,width={width}") for width in (64, 8))
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert some.items() <= shapes.items()
    assert shapes == {key: list(value.shape) for key, value in wide.state_dict().items()}
    assert list(shapes) == list(slim.state_dict())


def test_the_vision_transformer_has_the_names_of_torchvision():
    with torch.device("meta"):
        model = build("vit:image=224,patch=16,width=768,layers=12,heads=12,classes=1000")
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    layer = "encoder.layers.encoder_layer_11"
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    assert {
        "class_token": [1, 1, 768],
        "conv_proj.weight": [768, 3, 16, 16],
        "encoder.pos_embedding": [1, 197, 768],
        f"{layer}.self_attention.in_proj_weight": [2304, 768],
        f"{layer}.self_attention.out_proj.bias": [768],
        f"{layer}.mlp.0.weight": [3072, 768],
        f"{layer}.mlp.3.bias": [768],
        "encoder.ln.weight": [768],
        "heads.head.weight": [1000, 768],
    }.items() <= shapes.items()


def test_attention_is_that_of_torch():
    model = ViT(image=8, patch=4, width=12, layers=1, heads=3)
    ours = model.encoder.layers[0].self_attention
    theirs = nn.MultiheadAttention(12, 3, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_the_gpt_has_the_shape_of_nanogpt():
    with torch.device("meta"):
        model = build("gpt:vocab=50257,context=1024,width=768,layers=12,heads=12")
    names = set(model.state_dict())
    assert {
        "transformer.wte.weight",
        "transformer.h.11.attn.c_attn.bias",
        "transformer.h.0.mlp.c_proj.weight",
        "lm_head.weight",
    } <= names
    assert sum(p.numel() for p in model.parameters()) == 124_439_808, "GPT-2 small"
    small = build("gpt:vocab=11,context=6,width=8,layers=2,heads=2,bias=false")
    assert small.lm_head.weight is small.transformer["wte"].weight
    assert not any(name.endswith("bias") for name in small.state_dict())
    tokens = torch.randint(0, 11, (3, 6))
    logits = small(tokens)
    assert logits.shape == (3, 6, 11)
    # No token sees those behind it.
    torch.testing.assert_close(small(tokens[:, :4]), logits[:, :4])
    with pytest.raises(ModeconnError, match="texts have 7 tokens: expected at most 6"):
        small(torch.zeros(1, 7, dtype=torch.int64))


@pytest.mark.parametrize(
    ("spec", "x", "classes"),
    [
        ("vgg11:width=4", (2, 3, 32, 32), 10),
        ("vgg13_bn:width=4,classes=7,hidden=9", (2, 3, 32, 32), 7),
        ("vgg11_bn:width=2,form=imagenet,classes=3,channels=1", (2, 1, 40, 40), 3),
        ("resnet20:width=4", (2, 3, 32, 32), 10),
        ("resnet18:width=4,channels=1", (2, 1, 28, 28), 10),
        ("resnet50:width=2,form=imagenet", (2, 3, 33, 33), 1000),
        ("vit:width=12,layers=1,image=28,channels=1", (2, 1, 28, 28), 10),
    ],
)
def test_networks_run(spec, x, classes):
    model = build(spec)
    initialise(model, torch.Generator().manual_seed(0))
    assert model(torch.randn(*x)).shape == (2, classes)
    assert models.is_builtin(spec)


@pytest.mark.parametrize(
    "spec",
    [
        "vit:width=12,layers=1",
        "gpt:width=12,layers=1,context=8",
        "resnet20:width=2",
        "vgg11:width=2",
    ],
)
def test_a_seed_gives_the_weights(spec):
    first, second = build(spec), build(spec)
    for model in (first, second):
        initialise(model, torch.Generator().manual_seed(3))
    drawn = [key for key in first.state_dict() if "weight" in key]
    assert all(torch.equal(first.state_dict()[key], second.state_dict()[key]) for key in drawn)
    initialise(second, torch.Generator().manual_seed(4))
    assert not torch.equal(first.state_dict()[drawn[0]], second.state_dict()[drawn[0]])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "vgg11:",
            (
                "option '' is not known: expected some of "
                "width=64, hidden=0, classes=0, form=cifar, channels=3"
            ),
        ),
        ("vgg11:wide=16", "option 'wide' is not known"),
        ("vgg11:depth=16", "option 'depth' is not known"),
        ("vgg11:width", "option 'width' has no value: expected such as width=64"),
        ("vgg11:width=16,width=8", "option 'width' is given twice"),
        ("vgg11:width=0", "width is '0': expected a whole number of at least 1"),
        ("vgg11:width=1.5", "width is '1.5': expected a whole number"),
        ("vgg11:width=٣", "expected a whole number"),
        ("vgg11:form=mnist", "form is 'mnist': expected cifar or imagenet"),
        ("vgg11:width=100000", "parameters: expected at most"),
        ("vgg11:width=99999999999999", "model 'vgg11:width=99999999999999': "),
        ("vgg12", "model 'vgg12' is not known: expected mlp:IN"),
        ("resnet20:form=small", "form is 'small': expected cifar or imagenet"),
        ("vit:image=30", "image is 30 and patch is 4: expected a patch that divides the image"),
        ("vit:heads=5", "width is 192 and heads is 5"),
        ("gpt:heads=5", "width is 384 and heads is 5"),
        ("gpt:bias=no", "bias is 'no': expected true or false"),
    ],
)
def test_a_bad_option_is_one_clear_line(spec, message):
    with pytest.raises(ModeconnError) as caught:
        build(spec)
    assert message in str(caught.value)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_options_of_each_model_are_listed():
    assert models.options("resnet20") == ["width=0", "classes=0", "form=cifar", "channels=3"]
    assert models.options("mlp") == []
    with pytest.raises(
        ModeconnError, match="model 'vgg12' is not known: expected mlp or one of vgg11"
    ):
        models.options("vgg12")


@pytest.fixture
def factories(tmp_path: Path, monkeypatch):
    """A user's module in the current folder, off sys.path, as for an installed command."""
    (tmp_path / "mine_for_test.py").write_text(
        "from torch import nn\n"
        "class Nets:\n"
        "    def small(width=4):\n"
        "        return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 3))\n"
        "    small = staticmethod(small)\n"
        "def broken():\n"
        "    raise RuntimeError('first line\\nsecond line')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    )
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
    with pytest.raises(
        ModeconnError, match="model 'mine_for_test:broken' failed: RuntimeError: first line"
    ) as caught:
        build("mine_for_test:broken")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_initialisation_is_he_normal_and_follows_the_seed():
    def drawn(seed: int) -> nn.Module:
        model = nn.Sequential(
            nn.Linear(400, 300),
            nn.BatchNorm1d(300),
            nn.Conv2d(8, 64, 3),
            nn.Linear(7, 5, bias=False),
        )
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
