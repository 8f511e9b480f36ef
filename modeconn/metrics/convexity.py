"""Tells which losses are convex in the outputs, and why: a certificate on a swing rests on it.

On a swing the outputs are affine in t, so a loss that is convex in them stays below its chord. A
mean over samples, with weights that are not negative, keeps convexity. This is the one table; every
other loss is refused by name, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError
from modeconn.metrics.per_row import PerSample
from modeconn.metrics.torch_losses import read, understood

Loss = str | PerSample

# Name of ours, or function of PyTorch's: why it is convex in the outputs.
CONVEX: dict[str | Callable[..., Tensor], str] = {
    "cross_entropy": "a log-sum-exp of the outputs minus a linear function of them",
    "mse": "squares of affine functions of the outputs",
    "soft_cross_entropy": "a log-sum-exp of the outputs minus a linear function of them",
    "bce": "softplus of the outputs minus a linear function of them",
    F.cross_entropy: "a log-sum-exp of the outputs minus a linear function of them",
    F.nll_loss: "linear in the outputs",
    F.mse_loss: "squares of affine functions of the outputs",
    F.l1_loss: "absolute values of affine functions of the outputs",
    F.smooth_l1_loss: "a convex function of the outputs' distance from the targets",
    F.huber_loss: "a convex function of the outputs' distance from the targets",
    F.binary_cross_entropy_with_logits: "softplus of the outputs minus a linear function of them",
}
# Losses that are known and are not taken, with the reason.
_NOT_CONVEX: dict[str | Callable[..., Tensor], str] = {
    "next_token": "its texts have several outputs each, which no certificate covers yet",
    F.binary_cross_entropy: "it takes probabilities, and what a linear layer returns is none; "
    "use binary cross-entropy of logits",
}
_WEIGHTS = ("weight", "pos_weight")


def check_convex(loss: Loss) -> str:
    """Return why a loss is convex in the outputs.

    Args:
        loss: as for `evaluate`: a name, a loss of PyTorch's, or a callable.

    Raises:
        ModeconnError: it is not, or nothing is known of it; the text names it and says why.
    """
    name, kind, options = _described(loss)
    if kind in _NOT_CONVEX:
        raise _refusal(name, _NOT_CONVEX[kind])
    if kind not in CONVEX:
        raise _refusal(
            name,
            "nothing is known of how it depends on the outputs, and only a loss that is convex in "
            "them is bounded between two breakpoints",
        )
    for option in _WEIGHTS:
        weight = options.get(option)
        if isinstance(weight, Tensor) and not bool((weight >= 0).all()):
            raise _refusal(name, f"its {option} holds {float(weight.min()):.4g}, below zero")
    smoothing = options.get("label_smoothing", 0.0)
    if not 0.0 <= smoothing <= 1.0:
        raise _refusal(name, f"its label_smoothing is {smoothing}, outside of 0 to 1")
    return CONVEX[kind]


def name_of(loss: Loss) -> str:
    """Return what messages and certificates call a loss, its options included."""
    made = understood(loss) if read(loss) is not None else loss
    if isinstance(made, str):
        return made  # PyTorch's with the defaults is ours
    name, _, options = _described(loss)
    given = [f"{key}={_shown(value)}" for key, value in sorted(options.items()) if _counts(value)]
    return f"{name}({', '.join(given)})" if given else name


def _described(loss: Loss) -> tuple[str, str | Callable[..., Tensor] | None, Mapping[str, Any]]:
    """Return a loss's name, its key of the table (None for an unknown callable) and its options."""
    if isinstance(loss, str):
        return loss, loss, {}
    found = read(loss)
    if found is None:
        return getattr(loss, "__name__", type(loss).__name__), None, {}
    name, function, options = found
    return name, function, {key: value for key, value in options.items() if key != "reduction"}


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) or value not in (None, 0.0, -100)


def _shown(value: Any) -> str:
    return str(value.tolist()) if isinstance(value, Tensor) else str(value)


def _refusal(name: str, why: str) -> ModeconnError:
    return ModeconnError(
        f"loss is {name}: expected one that is convex in the outputs (cross_entropy, mse, bce, "
        f"PyTorch's own such as nn.CrossEntropyLoss): {why}"
    )
