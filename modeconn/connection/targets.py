"""The targets that subnetworks are trained on, with a loss that is convex in the outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.connection.labels import check_range
from modeconn.connection.loss_bounds import CertifiedLoss
from modeconn.errors import ModeconnError
from modeconn.metrics.convexity import Loss


@dataclass(frozen=True, eq=False)
class Targets:
    """Targets of N samples and the loss that is computed of them.

    Attributes:
        values: class labels int64 [N], or numbers [N, outputs].
        loss: None for cross-entropy of class labels.
        factor: what the losses of samples are multiplied by, so that their mean over the samples is
            the loss of the data set: not 1 where classes have weights.
    """

    values: Tensor
    loss: CertifiedLoss | None = None
    factor: float = 1.0

    @staticmethod
    def of(labels: Tensor | Targets) -> Targets:
        """Takes class labels as targets of cross-entropy."""
        return labels if isinstance(labels, Targets) else Targets(labels)

    @staticmethod
    def with_loss(values: Tensor, loss: Loss, outputs: int) -> Targets:
        """Fits targets to the outputs of a network.

        Args:
            values: of the data set, as it gives them. loss: as for `evaluate`.
            outputs: how many the network has.

        Raises:
            ModeconnError: the loss is not convex in the outputs; the targets do not fit it.
        """
        certified = CertifiedLoss(loss)
        like = torch.zeros(1, outputs, device=values.device).expand(len(values), outputs)
        fitted = certified.fit(like, values)
        count = certified.count(fitted)
        if not count > 0:
            raise ModeconnError(f"loss is {certified.name}: the weights of all labels are 0")
        plain = certified if certified.name != "cross_entropy" else None
        return Targets(fitted, plain, len(fitted) / count)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def name(self) -> str:
        """Names the loss."""
        return "cross_entropy" if self.loss is None else self.loss.name

    @property
    def has_error(self) -> bool:
        """Whether they are class labels, so that there is a 0-1 error."""
        return self.loss is None or self.loss.has_error

    def __getitem__(self, rows: Tensor | slice) -> Targets:
        """Returns the targets of some samples, whose losses have the factor of all."""
        return replace(self, values=self.values[rows])

    def losses(self, logits: Tensor) -> Tensor:
        """Computes the losses [D, N] of outputs [D, N, C]; they can be differentiated."""
        D, N, _ = logits.shape
        flat = logits.flatten(0, 1)
        values = self.values.repeat(D, *[1] * (self.values.dim() - 1))
        if self.loss is None:
            return F.cross_entropy(flat, values, reduction="none").view(D, N)
        return self.factor * self.loss.of_samples(flat, values).view(D, N)

    def wrong(self, logits: Tensor) -> Tensor:
        """Counts the wrong samples of outputs [D, N, C], [D]; NaN where there is no error."""
        if not self.has_error:
            return logits.new_full(logits.shape[:1], float("nan"))
        return (logits.argmax(2) != self.values).sum(1)

    def check(self, outputs: int, name: str) -> None:
        """Raises unless class labels are those of a network's outputs.

        Args:
            outputs: how many it has. name: of the network.
        """
        if self.has_error:
            check_range(self.values, outputs, name)
