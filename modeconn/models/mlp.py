"""Fully connected networks."""

from __future__ import annotations

import itertools
import re

import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.models.spec import MOST_LAYERS, MOST_PARAMETERS, check_size

GRAMMAR = "mlp:IN-HIDDEN[xCOUNT]-…-OUT[:ACTIVATION], such as mlp:784-245x10-10"
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
}
_WIDTH = re.compile(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?")


class MLP(nn.Sequential):
    """Linear layers with an activation between them.

    The parameters are ``0.weight``, ``0.bias``, ``2.weight``, …

    Args:
        widths: units of each layer, input and output included; at least two.
        activation: the class of the module between two linear layers.
    """

    def __init__(self, widths: list[int], activation: type[nn.Module] = nn.ReLU) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return outputs ``[N, OUT]`` of inputs ``[N, …]``, which are flattened to ``[N, IN]``."""
        outputs: torch.Tensor = super().forward(x.flatten(1))
        return outputs


def build_mlp(spec: str) -> MLP:
    """Build the perceptron that a spec such as ``"mlp:784-245x10-10"`` names.

    Raises:
        ModeconnError: the spec does not parse, or names a network that is too large.
    """
    shape, _, name = spec.removeprefix("mlp:").partition(":")
    if ":" in spec.removeprefix("mlp:") and name not in ACTIVATIONS:
        raise ModeconnError(
            f"model {spec!r}: activation {name!r} is not known: "
            f"expected one of {', '.join(ACTIVATIONS)}"
        )
    widths: list[int] = []
    for part in shape.split("-"):
        match = _WIDTH.fullmatch(part)
        if match is None:
            raise ModeconnError(
                f"model {spec!r}: {part!r} is not a width such as 245 or 245x10: expected {GRAMMAR}"
            )
        width, count = int(match[1]), int(match[2] or 1)
        if width * count > MOST_PARAMETERS:
            raise ModeconnError(
                f"model {spec!r}: {part!r} is too large: "
                f"expected at most {MOST_PARAMETERS:,} parameters"
            )
        if len(widths) + count > MOST_LAYERS:
            raise ModeconnError(
                f"model {spec!r} has {len(widths) + count:,} layers or more: expected at most "
                f"{MOST_LAYERS:,}, as each is a module of its own"
            )
        widths += [width] * count
    if len(widths) < 2:
        raise ModeconnError(
            f"model {spec!r} has one width: "
            f"expected at least the input's and the output's, as in {GRAMMAR}"
        )
    parameters = sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
    check_size(spec, parameters)
    return MLP(widths, ACTIVATIONS[name or "relu"])
