"""Numbers of an ensemble, from the logits of its members: mean, calibration, disagreement."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError


def mean_probabilities(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean of the members' softmax probabilities, float64 [N, classes].

    Args:
        logits: of the T members, [T, N, classes].
        weights: of the members, [T], which sum to 1; by default all count alike.
    """
    probabilities = F.softmax(logits.double(), dim=-1)
    if weights is None:
        return probabilities.mean(0)
    return torch.einsum("t,tnc->nc", weights.to(probabilities), probabilities)


def disagreements(logits: Tensor) -> Tensor:
    """Return on how many samples each two members predict different classes, [T, T]."""
    predicted = logits.argmax(-1)
    return (predicted[:, None] != predicted[None]).sum(-1)


class Calibration:
    """Expected calibration error (Guo et al. 2017), of batches of probabilities.

    It is the mean over samples of |accuracy - confidence| of the bin that their confidence, the
    largest probability, falls into; bins are equally wide and closed above.

    Args:
        bins: their number.
    """

    def __init__(self, bins: int = 15) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ModeconnError(f"bins is {bins!r}: expected a whole number, at least 1")
        self._sums = torch.zeros(3, bins, dtype=torch.float64)  # samples, confidence, right

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Take up some samples: probabilities [N, classes] and class labels [N]."""
        confidence, predicted = probabilities.double().cpu().max(-1)
        bins = self._sums.shape[1]
        place = (confidence * bins).ceil().long().clamp(1, bins) - 1
        right = (predicted == labels.cpu()).double()
        for row, values in enumerate((torch.ones_like(right), confidence, right)):
            self._sums[row].index_add_(0, place, values)

    @property
    def error(self) -> float:
        """The expected calibration error of all samples so far."""
        samples, confidence, right = self._sums
        return float((right - confidence).abs().sum() / samples.sum())
