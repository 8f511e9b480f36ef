"""Tensors that move with t: Σ_k coefficients[t, k] · tensors[k], not stored for all t at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.errors import ModeconnError


@dataclass(frozen=True, eq=False)
class Blended:
    """K tensors of one shape and their coefficients at T points.

    Coefficients that are 0 leave their tensor out, so that what is not finite in it does not
    matter, and a lone coefficient of 1 keeps every bit.

    Args:
        tensors: [K, …], the control points' weights, or shared values of the samples.
        coefficients: [T, K], on the same device.

    Raises:
        ModeconnError: shapes or devices that do not go together.
    """

    tensors: Tensor
    coefficients: Tensor

    def __post_init__(self) -> None:
        tensors, coefficients = self.tensors, self.coefficients
        if coefficients.dim() != 2 or tensors.dim() < 1 or coefficients.shape[1] != len(tensors):
            raise ModeconnError(
                f"coefficients have shape {list(coefficients.shape)} and tensors "
                f"{list(tensors.shape)}: expected [T, K] and [K, …]"
            )
        if coefficients.device != tensors.device:
            raise ModeconnError(
                f"coefficients are on {coefficients.device}, tensors on {tensors.device}: "
                "expected one device"
            )

    @classmethod
    def fixed(cls, tensor: Tensor, points: int) -> Blended:
        """Returns a tensor that is the same at all points, as a `Blended` of one term."""
        return cls(tensor[None], torch.ones((points, 1), device=tensor.device))

    @property
    def points(self) -> int:
        """The number of points, T."""
        return len(self.coefficients)

    @property
    def shape(self) -> torch.Size:
        """The shape at one point."""
        return self.tensors.shape[1:]

    def materialized(self) -> Tensor:
        """Returns the tensor at every point, [T, …], which the kernels avoid: their reference."""
        columns = self.coefficients.to(self.tensors)
        total = self.tensors.new_zeros((self.points, *self.shape))
        for tensor, column in zip(self.tensors, columns.T):
            weight = column.view(-1, *[1] * tensor.dim())
            total = total + torch.where(weight == 0, torch.zeros_like(tensor), weight * tensor)
        return total
