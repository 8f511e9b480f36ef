"""What is summed over the samples at the head of the network: losses, errors, and whatever the user adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError

# (outputs, targets) → one number per sample, [N].
PerSample = Callable[[Any, Tensor], Tensor]


class Head:
    """Sums of per-sample numbers, in float64, so that results are exact means whatever the batches.

    Args:
        loss: "cross_entropy" (class labels), "mse", "bce" (logits), or a callable (outputs, targets) → losses [N].
        metrics: "loss", "error", "top5_error", or callables (outputs, targets) → [N]; None for loss and, where the loss
            has one, error.

    Attributes:
        names: of the sums, in order.
    """

    def __init__(self, loss: str | PerSample, metrics: Sequence[str | PerSample] | None) -> None:
        if not callable(loss) and loss not in _LOSSES:
            raise ModeconnError(f"loss is {loss!r}: expected one of {', '.join(_LOSSES)}, or a callable")
        if metrics is None:
            metrics = ("loss", "error") if loss in ("cross_entropy", "bce") else ("loss",)
        if isinstance(metrics, str) or callable(metrics):
            metrics = (metrics,)
        self.loss = loss
        self.names: list[str] = []
        self._custom: dict[str, PerSample] = {}
        for metric in metrics:
            name = metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
            if isinstance(metric, str) and metric not in _METRICS:
                raise ModeconnError(f"metric {metric!r} is unknown: expected one of {', '.join(_METRICS)}, or a callable")
            if metric in ("error", "top5_error") and loss == "mse":
                raise ModeconnError(f'metric {metric!r} is for classes, and loss="mse" has none: ask for metrics=("loss",)')
            if metric == "top5_error" and loss == "bce":
                raise ModeconnError('metric "top5_error" is for class labels, and loss="bce" has none')
            if name in self.names:
                raise ModeconnError(f"metric {name!r} is asked for twice")
            if callable(metric):
                self._custom[name] = metric
            self.names.append(name)
        if not self.names:
            raise ModeconnError("metrics is empty: at least one is needed")

    @property
    def builtin(self) -> bool:
        """Whether a fused head of a backend may stand in: cross-entropy, error and top-5 error of class labels alone."""
        return self.loss == "cross_entropy" and not self._custom

    def fit(self, outputs: Any, targets: Tensor) -> Tensor:
        """The targets in the form that `sums` takes, checked against the network's output for a few rows.

        Raises:
            ModeconnError: the targets do not fit the outputs.
        """
        labelled = self.loss == "cross_entropy" or (callable(self.loss) and {"error", "top5_error"} & set(self.names))
        if callable(self.loss) and not labelled:
            return targets
        if not isinstance(outputs, Tensor):
            raise ModeconnError(
                f"the model returns a {type(outputs).__name__}, and loss={self.loss!r} takes a tensor: "
                "pass a callable (outputs, targets) as loss"
            )
        if labelled:
            if "top5_error" in self.names and outputs.shape[-1] < 6:
                raise ModeconnError(f'metric "top5_error" needs more than 5 classes, the model has {outputs.shape[-1]}')
            return _labels(outputs, targets)
        if not targets.is_floating_point() or targets.shape[1:].numel() != outputs.shape[1:].numel():
            raise ModeconnError(
                f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: loss={self.loss!r} expects floating "
                f"point of the outputs' shape {['N', *outputs.shape[1:]]}"
            )
        return targets.to(outputs.dtype).reshape(len(targets), *outputs.shape[1:])

    def zeros(self, points: int, device: torch.device) -> Tensor:
        """Sums to add to, float64 [points, len(names)]."""
        return torch.zeros(points, len(self.names), dtype=torch.float64, device=device)

    def sums(self, outputs: Any, targets: Tensor) -> Tensor:
        """Sums over the samples of every metric, float64 [len(names)]."""
        values: dict[str, Tensor] = {name: custom(outputs, targets) for name, custom in self._custom.items()}
        if callable(self.loss):
            if "loss" in self.names:
                values["loss"] = self.loss(outputs, targets)
            if "error" in self.names:
                values["error"] = _argmax_error(outputs, targets)
        elif self.loss == "cross_entropy":
            values |= _cross_entropy(outputs, targets)
        else:
            values |= _LOSSES[self.loss](outputs, targets)
        if "top5_error" in self.names:
            values["top5_error"] = _top5_error(outputs, targets)
        samples = len(targets)
        for name in self.names:
            value = values[name]
            if not isinstance(value, Tensor) or value.shape != (samples,):
                shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ModeconnError(
                    f"{name} gives {shape} for {samples} samples: expected one number per sample, [{samples}] "
                    '(reduction="none" in PyTorch\'s losses)'
                )
        return torch.stack([values[name].sum(dtype=torch.float64) for name in self.names])


def _labels(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.dim() != 2:
        raise ModeconnError(
            f"outputs have shape {['N', *outputs.shape[1:]]}: class labels need [N, classes]; "
            "pass a callable (outputs, targets) as loss"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.dim() != 1:
        raise ModeconnError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: class labels are integers [N]"
        )
    classes = outputs.shape[1]
    low, high = (int(v) for v in torch.aminmax(targets))
    if low < 0 or high >= classes:
        raise ModeconnError(
            f"label {low if low < 0 else high} is out of range: the model has {classes} classes, 0 to {classes - 1}"
        )
    return targets.long()


def _cross_entropy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """-log softmax(logits)[label] and whether the label is not the first maximum, sharing the shifted logits.

    The shift by the maximum keeps the loss of a confident network accurate: log(1 + tiny) is not formed from large numbers.
    """
    shifted = logits - logits.amax(1, keepdim=True)
    own = shifted.gather(1, labels[:, None]).squeeze(1)
    loss = shifted.exp().sum(1).log() - own
    # argmax over a short axis is slow; with one maximum per sample the label is right where its shifted logit is zero.
    if int((shifted == 0).sum()) == len(labels):
        wrong = own != 0
    else:
        wrong = _argmax_error(logits, labels)
    return {"loss": loss, "error": wrong}


def _argmax_error(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1) != labels


def _top5_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is not among the five largest. A tie is decided as torch.topk decides it."""
    return (logits.topk(5, dim=1).indices != labels[:, None]).all(1)


def _mse(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"loss": (outputs - targets).square().flatten(1).mean(1) if outputs.dim() > 1 else (outputs - targets).square()}


def _bce(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    wrong = ((logits > 0) != (targets > 0.5)).to(logits.dtype)
    return (
        {"loss": loss.flatten(1).mean(1), "error": wrong.flatten(1).mean(1)}
        if loss.dim() > 1
        else {"loss": loss, "error": wrong}
    )


_LOSSES: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "mse": _mse,
    "bce": _bce,
}
_METRICS = ("loss", "error", "top5_error")
