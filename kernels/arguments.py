"""Checks the kernels' arguments and brings them into the forms that launches take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.errors import ModeconnError
from modeconn.kernels.activations import ACTIVATIONS
from modeconn.kernels.blended import Blended
from modeconn.kernels.launch import INTERPRETED

# Types of values in memory; all arithmetic on them is float32.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Samples:
    """The input of the samples, in the one form that kernels take.

    Attributes:
        values: [T, N, …], [N, …] the same at all points, or [J, N, …] shared values.
        coefficients: [T, J] of shared values, else None.
        points: T, or None where the input does not say.
        per_point: whether values are [T, N, …].
    """

    values: Tensor
    coefficients: Tensor | None
    points: int | None
    per_point: bool

    @property
    def shape(self) -> torch.Size:
        """The shape at one point, [N, …]."""
        stacked = self.per_point or self.coefficients is not None
        return self.values.shape[1:] if stacked else self.values.shape

    @property
    def terms(self) -> int:
        """The number of shared values J, or 0 where there is nothing to combine."""
        return 0 if self.coefficients is None else self.coefficients.shape[1]

    def strides(self) -> tuple[int, ...]:
        """Strides of the points (0 where they share) or the shared values, then of other axes."""
        own = self.values.stride()
        return own if self.values.dim() > len(self.shape) else (0, *own)


@dataclass(frozen=True, eq=False)
class PathLayer:
    """A linear layer of a chain: act(x W(t)ᵀ + b(t))."""

    weight: Blended
    bias: Blended | None = None
    activation: str = "identity"
    slope: float = 0.01


@dataclass(frozen=True)
class Options:
    """The arguments of a linear layer that are no tensors."""

    activation: str = "identity"
    slope: float = 0.01
    input_activation: str = "identity"
    input_slope: float = 0.01
    precision: str = "float32"


def samples_of(
    name: str, x: Tensor | Blended, dim: int, input_activation: str = "identity"
) -> Samples:
    """Checks an input of the samples and brings it into the one form.

    Args:
        dim: how many axes it has at one point, samples included.
        input_activation: of a `Blended`.

    Raises:
        ModeconnError: another number of axes or dtype, or an activation of something that is not
            blended.
    """
    check_activation("input_activation", input_activation)
    values = x.tensors if isinstance(x, Blended) else x
    expected = {dim + 1} if isinstance(x, Blended) else {dim, dim + 1}
    if not isinstance(values, Tensor) or values.dim() not in expected:
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ModeconnError(
            f"{name} has shape {shape}: expected {' or '.join(map(str, sorted(expected)))} axes"
        )
    _check_dtype(name, values)
    if isinstance(x, Blended):
        return Samples(values, check_blended(name, x).coefficients, x.points, False)
    if input_activation != "identity":
        raise ModeconnError(
            f"input_activation is {input_activation!r} and {name} is a tensor: "
            "it belongs to a Blended"
        )
    per_point = values.dim() == dim + 1
    return Samples(values, None, len(values) if per_point else None, per_point)


def check_blended(
    name: str, blended: Blended, shape: tuple[int, ...] | None = None, points: int | None = None
) -> Blended:
    """Checks a `Blended` and returns it with contiguous float32 coefficients.

    Raises:
        ModeconnError: a dtype, shape at one point or number of points that is not the expected one.
    """
    if not isinstance(blended, Blended):
        raise ModeconnError(
            f"{name} is a {type(blended).__name__}: expected a Blended "
            "(Blended.fixed for what does not move)"
        )
    _check_dtype(name, blended.tensors)
    if shape is not None and tuple(blended.shape) != shape:
        raise ModeconnError(
            f"{name} has shape {list(blended.shape)} at one point: expected {list(shape)}"
        )
    if points is not None and blended.points != points:
        raise ModeconnError(
            f"{name} has {blended.points} points: expected {points}, as the first weight has"
        )
    if blended.coefficients.requires_grad:
        raise ModeconnError(
            f"the coefficients of {name} require a gradient, which the kernels do not compute: "
            "detach them"
        )
    return Blended(blended.tensors, blended.coefficients.float().contiguous())


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        kinds = ", ".join(map(str, DTYPES))
        raise ModeconnError(f"{name} has dtype {tensor.dtype}: expected one of {kinds}")


def check_layer(name: str, layer: PathLayer, depth: int, first: Blended | None = None) -> PathLayer:
    """Checks a layer whose weight takes `depth` inputs, and returns it as kernels read it.

    Args:
        first: the chain's first weight, which has as many points.
        name: a prefix of the messages' names, such as "layer 2's ".
    """
    if not isinstance(layer, PathLayer):
        raise ModeconnError(f"{name or 'layer'} is a {type(layer).__name__}: expected a PathLayer")
    check_activation(f"{name}activation", layer.activation)
    points = first.points if isinstance(first, Blended) else None
    weight = check_blended(f"{name}weight", layer.weight, None, points)
    if len(weight.shape) != 2 or weight.shape[1] != depth:
        raise ModeconnError(
            f"{name}weight has shape {list(weight.shape)} at one point: "
            f"expected [out, in] with in = {depth}"
        )
    bias = layer.bias
    if bias is not None:
        bias = check_blended(f"{name}bias", bias, (weight.shape[0],), weight.points)
    return PathLayer(weight, bias, layer.activation, layer.slope)


def check_points(x: Samples, weight: Blended) -> int:
    """Checks that an input and a weight have as many points, and returns T."""
    if x.points not in (None, weight.points):
        raise ModeconnError(
            f"x has {x.points} points and the weight {weight.points}: expected as many"
        )
    return weight.points


def check_activation(name: str, activation: str) -> None:
    """Checks an activation's name."""
    if activation not in ACTIVATIONS:
        raise ModeconnError(f"{name} is {activation!r}: expected one of {', '.join(ACTIVATIONS)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Checks that all tensors are on one device that kernels run on.

    Raises:
        ModeconnError: several devices, or a CPU outside of Triton's interpreter.
    """
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ModeconnError(f"tensors are on several devices: {places}: expected one")
    name, device = next(iter(devices.items()))
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        where = "CUDA devices (on the CPU with TRITON_INTERPRET=1)"
        if INTERPRETED:
            where = "the CPU (TRITON_INTERPRET is set)"
        raise ModeconnError(f"{name} is on {device}: the kernels run on {where}")


def check_targets(targets: Tensor, samples: int) -> Tensor:
    """Checks class labels [N] and returns them contiguous.

    Their values are not read, which would wait for the device: a label that is no class gives a
    loss of NaN.
    """
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    if (
        not isinstance(targets, Tensor)
        or targets.shape != (samples,)
        or targets.dtype not in integers
    ):
        given = type(targets).__name__
        if isinstance(targets, Tensor):
            given = f"{list(targets.shape)} and dtype {targets.dtype}"
        raise ModeconnError(
            f"targets have shape {given}: expected integers [{samples}], one class per sample"
        )
    return targets.contiguous()
