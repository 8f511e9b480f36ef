"""The mean loss of a batch, differentiable, from any loss that `evaluate` takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from modeconn.data.inputs import Inputs, call, take
from modeconn.errors import ModeconnError, first_line
from modeconn.metrics import Head, PerSample
from modeconn.metrics.head import logits_of

# Rows that targets are checked against the model's outputs with.
_ROWS = 2
Objective = Callable[[Any, Tensor], Tensor]


def objective_of(
    loss: str | PerSample, model: Any, inputs: Inputs, targets: Tensor
) -> tuple[Objective, Tensor]:
    """Return the mean loss as a function of outputs and labels, and all labels in its form.

    Args:
        loss: as for `evaluate`.
        model: in evaluation mode, on the device of the data.
        inputs: all of them.
        targets: all of them.

    Raises:
        ModeconnError: the model does not take the inputs, or the targets do not fit its outputs.
    """
    head = Head(loss, ("loss",))
    try:
        outputs = call(model, take(inputs, 0, _ROWS))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModeconnError(
            f"the model does not take the data's inputs: {first_line(error)}"
        ) from error
    labels = head.fit(outputs, head.counted(inputs, targets))
    # PyTorch's own mean, where it is the same: one call less
    if head.loss == "cross_entropy" and labels.dim() == 1 and not head.leaves_out:
        return _cross_entropy, labels

    def mean(outputs: Any, labels: Tensor) -> Tensor:
        return head.sums(outputs, labels)[0] / head.counts(labels)[0].clamp(min=1e-300)

    return mean, labels


def _cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits_of(outputs), labels)
