"""The loss that a certificate bounds: its sums, and the largest that rounding can make of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError
from modeconn.metrics import Head
from modeconn.metrics.convexity import Loss, check_convex, name_of
from modeconn.metrics.head import LOSSES
from modeconn.metrics.numbers import per_sample
from modeconn.metrics.torch_losses import TorchLoss, converted

_OF_NUMBERS: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "bce": F.binary_cross_entropy_with_logits,
}
# Roundings of a loss beside those of its sum over outputs: differences, exponentials, a logarithm.
_BESIDE = 8


class CertifiedLoss:
    """A loss that is convex in the outputs.

    Attributes:
        name: as certificates have it, options included.
        has_error: whether targets are class labels, so that there is a 0-1 error.

    Raises:
        ModeconnError: the loss is not convex, or not known to be.
    """

    def __init__(self, loss: Loss) -> None:
        check_convex(loss)
        self.name = name_of(loss)
        self._head = Head(loss, ("loss",))
        self.has_error = self._head.of_classes

    def fit(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the targets as the other methods take them.

        Raises:
            ModeconnError: they do not fit the outputs, or a label is one that does not count.
        """
        y = self._head.fit(outputs, targets.to(outputs.device))
        if self._head.leaves_out:
            raise ModeconnError(
                "a label is -100: a certificate needs a class for every sample; leave such "
                "samples out"
            )
        return y

    def total(self, outputs: Tensor, y: Tensor) -> float:
        """Returns the sum of the losses."""
        return float(self._head.sums(outputs, y)[0])

    def of_samples(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Returns the losses [N] of samples, class weights included; they can be differentiated."""
        loss = self._head.loss
        if isinstance(loss, TorchLoss):
            return loss.values(outputs, y)
        return LOSSES[str(loss)](outputs, y)["loss"]

    def count(self, y: Tensor) -> float:
        """Returns what the sum is divided by for the mean: samples, or their classes' weights."""
        return float(self._head.counts(y)[0])

    def largest_total(self, outputs: Tensor, errors: Tensor, y: Tensor) -> float:
        """Returns an upper bound of the sum over all outputs within some errors.

        A convex loss is largest at a corner; the sum takes each sample's own.

        Args:
            outputs, errors: [N, C].
        """
        loss = self._head.loss
        if loss == "cross_entropy":
            return self.total(worst_logits(outputs, errors, y), y)
        if isinstance(loss, TorchLoss) and loss.function is F.nll_loss:
            return self.total(outputs - errors, y)
        if isinstance(loss, TorchLoss) and loss.of_classes:
            # log-sum-exp(z + E) - q·(z - E), where the targets q sum to at most the class's weight
            weight = 1.0 if loss.weight is None else float(loss.weight.max())
            spread = 2 * weight * float(errors.amax(1).sum())
            return self.total(outputs + errors, y) + spread
        if loss == "soft_cross_entropy":
            # log-sum-exp(z) moves by at most E, weighted by the sum of the targets, and q·z by q·E
            spread = 2 * float((y.abs().sum(1) * errors.amax(1)).sum())
            return self.total(outputs, y) + spread
        return self._largest_of_numbers(outputs, errors, y)

    def _largest_of_numbers(self, outputs: Tensor, errors: Tensor, y: Tensor) -> float:
        loss = self._head.loss
        function = loss.function if isinstance(loss, TorchLoss) else _OF_NUMBERS[str(loss)]
        options = converted(loss.options, outputs) if isinstance(loss, TorchLoss) else {}
        ends = [
            function(outputs + sign * errors, y.to(outputs.dtype), **options, reduction="none")
            for sign in (-1, 1)
        ]
        return float(per_sample(torch.maximum(*ends)).sum(dtype=torch.float64))

    def own_rounding(self, outputs: Tensor, total: float, roundoff: float) -> float:
        """Returns a bound on the rounding of the sum itself, for outputs that are given.

        Args:
            total: the sum of the losses. roundoff: unit roundoff of a sample's loss; sums over
                samples are float64.
        """
        terms = outputs.shape[1] + _BESIDE
        largest = float(outputs.abs().amax(1).sum())
        return terms * roundoff * (abs(total) + 2 * largest + len(outputs))


def worst_logits(logits: Tensor, errors: Tensor, labels: Tensor) -> Tensor:
    """Returns the logits within some errors that are worst for the labels: their own low.

    Args:
        logits, errors: [N, C]. labels: int64 [N].
    """
    own = F.one_hot(labels, logits.shape[1]).bool()
    return torch.where(own, logits - errors, logits + errors)
