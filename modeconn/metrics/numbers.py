"""Losses of numbers: squared errors, and binary cross-entropy of logits."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError


def fit_numbers(outputs: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Return targets in the dtype and shape of the outputs; axes of size 1 are added or dropped.

    Args:
        outputs: of the network, for a few rows.
        targets: the user's.
        loss: names the loss in messages.

    Raises:
        ModeconnError: the targets are no numbers, or have another shape.
    """
    own, others = outputs.shape[1:], targets.shape[1:]
    same = [n for n in own if n != 1] == [n for n in others if n != 1]
    if not targets.is_floating_point() or not same:
        raise ModeconnError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: "
            f"loss={loss} expects floating point of the outputs' shape {['N', *own]}; "
            + ("permute or reshape the targets" if not same else "pass targets.float()")
        )
    return targets.to(outputs.dtype).reshape(len(targets), *own)


def per_sample(values: Tensor) -> Tensor:
    """Return the mean over all axes but the first."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def mse(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the mean squared error of each sample."""
    return {"loss": per_sample((outputs - targets).square())}


def bce(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the binary cross-entropy of each sample, and its fraction of wrong bits."""
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    wrong = ((logits > 0) != (targets > 0.5)).to(logits.dtype)
    return {"loss": per_sample(loss), "error": per_sample(wrong)}


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return the cross-entropy of each sample with its own weights of the classes, [N, classes]."""
    return {"loss": -(targets * F.log_softmax(logits, 1)).flatten(1).sum(1)}
