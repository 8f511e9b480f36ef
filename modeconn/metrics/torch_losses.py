"""PyTorch's own losses, as modules, functions or partials of them, with their own means.

`nn.CrossEntropyLoss()` returns the mean of a batch, and the mean of such means is not that of the
data set: batches differ in size, in labels that count, in the weights of their classes. So the
losses of labels or samples are taken, and the sums divided once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss

from modeconn.errors import ModeconnError
from modeconn.metrics.classes import IGNORED
from modeconn.metrics.numbers import per_sample

# By function: the name of its module, and the options that both have.
_KNOWN: dict[Callable[..., Tensor], tuple[type[nn.Module], tuple[str, ...]]] = {
    F.cross_entropy: (nn.CrossEntropyLoss, ("weight", "ignore_index", "label_smoothing")),
    F.nll_loss: (nn.NLLLoss, ("weight", "ignore_index")),
    F.mse_loss: (nn.MSELoss, ()),
    F.l1_loss: (nn.L1Loss, ()),
    F.smooth_l1_loss: (nn.SmoothL1Loss, ("beta",)),
    F.huber_loss: (nn.HuberLoss, ("delta",)),
    F.binary_cross_entropy: (nn.BCELoss, ("weight",)),
    F.binary_cross_entropy_with_logits: (nn.BCEWithLogitsLoss, ("weight", "pos_weight")),
}
_FUNCTION_OF = {module: function for function, (module, _) in _KNOWN.items()}
_OF_CLASSES = (F.cross_entropy, F.nll_loss)
# Losses that are ours where all options have their defaults, in PyTorch's own mean.
_OWN = {
    F.cross_entropy: "cross_entropy",
    F.mse_loss: "mse",
    F.binary_cross_entropy_with_logits: "bce",
}
_DEFAULTS = {"weight": None, "pos_weight": None, "ignore_index": IGNORED, "label_smoothing": 0.0}


@dataclass(frozen=True)
class TorchLoss:
    """A loss of PyTorch's, of which the mean is taken as PyTorch takes it.

    Attributes:
        name: for messages.
        function: of `torch.nn.functional`.
        options: its arguments, but for the reduction.
    """

    name: str
    function: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def of_classes(self) -> bool:
        """Whether targets are class labels."""
        return self.function in _OF_CLASSES

    @property
    def ignored(self) -> int:
        """The label that does not count."""
        return int(self.options.get("ignore_index", IGNORED))

    @property
    def weight(self) -> Tensor | None:
        """Weights of classes, or of numbers."""
        return self.options.get("weight")

    def check(self, outputs: Tensor) -> None:
        """Check the weights against outputs of a few rows.

        Raises:
            ModeconnError: there are weights for another number of classes, or for single rows.
        """
        if self.weight is None:
            return
        shape = self.weight.shape
        if self.of_classes and shape not in {(n,) for n in outputs.shape[1:]}:
            raise ModeconnError(
                f"{self.name} has a weight of shape {list(shape)}, and outputs have shape "
                f"{['N', *outputs.shape[1:]]}: expected a weight for each class"
            )
        if not self.of_classes and len(shape) >= outputs.dim() and shape[0] != 1:
            raise ModeconnError(
                f"{self.name} has a weight of shape {list(shape)}, one for each row: expected "
                f"weights that rows share, {list(outputs.shape[1:])}"
            )

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the losses of labels [M], or of samples [N]."""
        options = converted(self.options, outputs)
        if self.of_classes:
            options.pop("ignore_index", None)  # such labels are left out before
        loss = self.function(outputs, targets, **options, reduction="none")
        return loss if self.of_classes else per_sample(loss)

    def count(self, labels: Tensor) -> float:
        """Return what the sum of the losses of class labels is divided by: their weights' sum."""
        given = labels[labels != IGNORED]
        if self.weight is None:
            return float(given.numel())
        return float(self.weight.to(labels.device, torch.float64)[given].sum())


def converted(options: Mapping[str, Any], outputs: Tensor) -> dict[str, Any]:
    """Return options with their tensors in the outputs' dtype and on their device."""

    def convert(value: Any) -> Any:
        return value.to(outputs.device, outputs.dtype) if isinstance(value, Tensor) else value

    return {name: convert(value) for name, value in options.items()}


def understood(loss: Any) -> Any:
    """Return a loss or metric as it is to be computed.

    Returns:
        a name of ours, or a `TorchLoss`, for a mean of PyTorch's; otherwise a callable that is
        called as it is, with weights in the outputs' dtype.

    Raises:
        ModeconnError: a loss of PyTorch's with a reduction of which the data set has no mean.
    """
    found = read(loss)
    if found is None:
        _check_others(loss)
        return loss
    name, function, options = found
    reduction = options.pop("reduction", "mean")
    if reduction == "none":
        return _unreduced(loss, function, options)
    if reduction != "mean":
        raise ModeconnError(
            f'{name} has reduction {reduction!r}: expected "mean", or "none" for one loss per '
            "sample"
        )
    unknown = sorted(set(options) - set(_KNOWN[function][1]))
    if unknown:
        raise ModeconnError(
            f"{name} has the argument {unknown[0]!r}, which is not understood beside a mean: "
            'expected reduction="none", and one loss per sample'
        )
    plain = function in _OWN and all(map(_is_default, options, options.values()))
    return _OWN[function] if plain else TorchLoss(name, function, options)


def _is_default(name: str, value: Any) -> bool:
    return not isinstance(value, Tensor) and value == _DEFAULTS[name]


def read(loss: Any) -> tuple[str, Callable[..., Tensor], dict[str, Any]] | None:
    """Return name, function and options of a loss of PyTorch's; None for any other callable.

    "reduction" is among the options.
    """
    if type(loss) in _FUNCTION_OF:
        function = _FUNCTION_OF[type(loss)]
        options = {name: getattr(loss, name) for name in _KNOWN[function][1]}
        return f"nn.{type(loss).__name__}", function, options | {"reduction": loss.reduction}
    if isinstance(loss, functools.partial):
        if loss.args or not _is_known(loss.func):
            return None
        return _name(loss.func), loss.func, dict(loss.keywords)
    return (_name(loss), loss, {}) if _is_known(loss) else None


def _is_known(function: Any) -> bool:
    return any(function is known for known in _KNOWN)


def _name(function: Any) -> str:
    return f"F.{function.__name__}"


def _check_others(loss: Any) -> None:
    """Raise a ModeconnError for another loss module of PyTorch's that returns a mean or a sum."""
    own = isinstance(loss, _Loss) and type(loss).__module__ == _Loss.__module__
    if own and loss.reduction != "none":
        raise ModeconnError(
            f"nn.{type(loss).__name__} has reduction {loss.reduction!r}: expected "
            'reduction="none", and one loss per sample'
        )


def _unreduced(
    loss: Any, function: Callable[..., Tensor], options: dict[str, Any]
) -> Callable[[Any, Tensor], Tensor]:
    """Return one of PyTorch's losses per sample, with weights in the outputs' dtype."""

    def values(outputs: Any, targets: Tensor) -> Tensor:
        given = converted(options, outputs) if isinstance(outputs, Tensor) else options
        return function(outputs, targets, **given, reduction="none")

    values.__name__ = getattr(loss, "__name__", type(loss).__name__)
    return values
