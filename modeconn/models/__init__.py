"""Models by name: the built-in ones, and factories imported from the user's own code."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.models import mlp
from modeconn.models.factory import call_factory
from modeconn.models.gpt import GPT
from modeconn.models.mlp import ACTIVATIONS, MLP
from modeconn.models.pretrained import PREFIX, build_pretrained
from modeconn.models.resnet import ResNet
from modeconn.models.spec import call, describe
from modeconn.models.vgg import VGG
from modeconn.models.vit import ViT

__all__ = [
    "ACTIVATIONS",
    "GPT",
    "GRAMMAR",
    "MLP",
    "VGG",
    "ResNet",
    "ViT",
    "build",
    "initialise",
    "is_builtin",
    "options",
]

# Name → constructor, and the arguments that the name stands for.
_FAMILIES: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {}
for _depth in (11, 13, 16, 19):
    _FAMILIES[f"vgg{_depth}"] = (VGG, {"depth": _depth, "norm": False})
    _FAMILIES[f"vgg{_depth}_bn"] = (VGG, {"depth": _depth, "norm": True})
_FAMILIES |= {f"resnet{depth}": (ResNet, {"depth": depth}) for depth in (18, 20, 32, 34, 50, 56)}
_FAMILIES |= {"vit": (ViT, {}), "gpt": (GPT, {})}
_NAMES = ", ".join(_FAMILIES)
GRAMMAR = (
    f"{mlp.GRAMMAR}; one of {_NAMES} with options or without, such as vgg11_bn:width=16; "
    "hf:FOLDER; or package.module:factory"
)
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def build(spec: str, trust_remote_code: bool = False) -> nn.Module:
    """Build the model that a spec names.

    Args:
        spec: ``"mlp:784-245x10-10"`` is an MLP with ten hidden layers of 245 units and ReLU;
            ``"mlp:64-32-10:tanh"`` names another activation. ``"vgg11:width=16,classes=10"`` is one
            of the other built-in models, with options; `options` lists them.
            ``"hf:FOLDER"`` is the model of transformers that the config.json in FOLDER describes.
            ``"package.module:factory"`` calls a function or class of the user's own, without
            arguments. Modules are also found in the current folder.
        trust_remote_code: run code in FOLDER, where transformers has no such model.

    Returns:
        The model, in training mode, with the weights that PyTorch or the factory gave it.

    Raises:
        ModeconnError: the spec does not parse, or the factory cannot be imported or makes no
            module.
    """
    if spec.startswith("mlp:"):
        return mlp.build_mlp(spec)
    name = spec.partition(":")[0]
    if name in _FAMILIES:
        return call(spec, *_FAMILIES[name])
    if spec.startswith(PREFIX):
        return build_pretrained(spec, trust_remote_code)
    if _FACTORY.fullmatch(spec):
        return call_factory(spec)
    raise ModeconnError(f"model {spec!r} is not known: expected {GRAMMAR}")


def is_builtin(spec: str) -> bool:
    """Whether a spec names a built-in model, so that no code of the user's is imported."""
    return spec.startswith("mlp:") or spec.partition(":")[0] in _FAMILIES


def options(name: str) -> list[str]:
    """List the options of a built-in model with their defaults: ["width=64", …], [] for "mlp".

    Raises:
        ModeconnError: there is no such model.
    """
    if name == "mlp":
        return []
    if name not in _FAMILIES:
        raise ModeconnError(f"model {name!r} is not known: expected mlp or one of {_NAMES}")
    return describe(*_FAMILIES[name])


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw new weights in place: He et al. 2015, normal with variance 2 / fan-in, and zero biases.

    Only linear and convolution layers are touched. The built-in transformers draw theirs as they
    are usually drawn.

    Args:
        model: the model.
        generator: a CPU generator; weights on other devices are drawn on the CPU and copied, so
            that a seed gives the same network everywhere.
    """
    if isinstance(model, (GPT, ViT)):
        model.initialise(generator)
        return
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            drawn = torch.empty(module.weight.shape, dtype=module.weight.dtype)
            nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
            with torch.no_grad():
                module.weight.copy_(drawn)
                if module.bias is not None:
                    module.bias.zero_()
