"""Models by name: the built-in perceptrons, and factories imported from the user's own code."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from modeconn.errors import ModeconnError

GRAMMAR = "mlp:IN-HIDDEN[xCOUNT]-…-OUT[:ACTIVATION], such as mlp:784-245x10-10, or package.module:factory"
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
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
# Beyond what fits a machine, so that a slip of typing fails here and not in the allocator.
_MOST_PARAMETERS = 10**10


class MLP(nn.Sequential):
    """Linear layers with an activation between them; parameters ``0.weight``, ``0.bias``, ``2.weight``, …

    Args:
        widths: units of each layer, input and output included; at least two.
        activation: makes the module between two linear layers.
    """

    def __init__(self, widths: list[int], activation: type[nn.Module] = nn.ReLU) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), activation()]
        super().__init__(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs ``[N, OUT]`` of inputs ``[N, …]``, which are flattened to ``[N, IN]``."""
        outputs: torch.Tensor = super().forward(x.flatten(1))
        return outputs


def build(spec: str) -> nn.Module:
    """Make the model that `spec` names.

    Args:
        spec: ``"mlp:784-245x10-10"`` is an MLP with ten hidden layers of 245 units and ReLU;
            ``"mlp:64-32-10:tanh"`` names another activation; ``"package.module:factory"`` calls a function or
            class of the user's own, without arguments.  Modules are also found in the current folder.

    Returns:
        The model, in training mode, with the weights that PyTorch or the factory gave it.

    Raises:
        ModeconnError: where the spec does not parse, or the factory cannot be imported or makes no module.
    """
    if spec.startswith("mlp:"):
        return _build_mlp(spec)
    if _FACTORY.fullmatch(spec):
        return _call_factory(spec)
    raise ModeconnError(f"model {spec!r} is not known: expected {GRAMMAR}")


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw new weights in place: He et al. 2015, normal with variance 2 / fan-in, and zero biases.

    Only linear and convolution layers are touched.

    Args:
        model: the model.
        generator: a CPU generator; weights on other devices are drawn on the CPU and copied, so that a seed
            gives the same network everywhere.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            drawn = torch.empty(module.weight.shape, dtype=module.weight.dtype)
            nn.init.kaiming_normal_(drawn, nonlinearity="relu", generator=generator)
            with torch.no_grad():
                module.weight.copy_(drawn)
                if module.bias is not None:
                    module.bias.zero_()


def _build_mlp(spec: str) -> MLP:
    shape, _, name = spec.removeprefix("mlp:").partition(":")
    if ":" in spec.removeprefix("mlp:") and name not in ACTIVATIONS:
        raise ModeconnError(f"model {spec!r}: activation {name!r} is not known, expected one of {', '.join(ACTIVATIONS)}")
    widths: list[int] = []
    for part in shape.split("-"):
        match = _WIDTH.fullmatch(part)
        if match is None:
            raise ModeconnError(f"model {spec!r}: {part!r} is not a width such as 245 or 245x10; expected {GRAMMAR}")
        width, count = int(match[1]), int(match[2] or 1)
        if width * count > _MOST_PARAMETERS:
            raise ModeconnError(f"model {spec!r}: {part!r} is too large")
        widths += [width] * count
    if len(widths) < 2:
        raise ModeconnError(f"model {spec!r} has one width, expected at least the input's and the output's: {GRAMMAR}")
    parameters = sum((inputs + 1) * outputs for inputs, outputs in itertools.pairwise(widths))
    if parameters > _MOST_PARAMETERS:
        raise ModeconnError(f"model {spec!r} has {parameters:,} parameters, expected at most {_MOST_PARAMETERS:,}")
    return MLP(widths, ACTIVATIONS[name or "relu"])


def _call_factory(spec: str) -> nn.Module:
    module_name, _, attribute = spec.partition(":")
    with _current_folder_first():
        try:
            factory: object = importlib.import_module(module_name)
            for part in attribute.split("."):
                factory = getattr(factory, part)
        except Exception as error:  # importing runs the user's code, which can raise anything
            raise ModeconnError(f"model {spec!r} cannot be imported: {_first_line(error)}") from error
        if not callable(factory):
            kind = type(factory).__name__
            raise ModeconnError(f"model {spec!r} is {kind}, expected a function or class that makes a module")
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise ModeconnError(f"model {spec!r} is called without arguments, but: {error}") from error
        except ValueError:
            pass  # some callables of C have no signature to look at
        try:
            model = factory()
        except Exception as error:
            raise ModeconnError(f"model {spec!r} failed: {_first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModeconnError(f"model {spec!r} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


@contextmanager
def _current_folder_first() -> Iterator[None]:
    """Let imports see the current folder, as `python -m` does and an installed command does not."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
