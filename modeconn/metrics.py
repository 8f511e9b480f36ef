"""Losses, errors and the user's metrics, as sums over the samples at the head of the network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.errors import ModeconnError

# (outputs, targets) → one number per sample, [N].
PerSample = Callable[[Any, Tensor], Tensor]
# The label of a token or pixel that does not count, as in PyTorch's losses.
IGNORED = -100
_LABELLED = ("cross_entropy", "next_token")


class Head:
    """Sums of per-sample numbers, in float64, so that results are exact means whatever the batches.

    Args:
        loss: "cross_entropy" (class labels, per sample or per token or pixel; those that are -100
            are left out, as in PyTorch), "next_token" (cross-entropy for texts [N, length] whose
            labels are the texts themselves: the outputs at each place are for the token after it),
            "mse", "bce" (logits), or a callable (outputs, targets) → losses [N].
        metrics: "loss", "error", "top5_error", "perplexity" (exp of the mean loss), or callables
            (outputs, targets) → [N]; None for loss and, where the loss has one, error.

    Attributes:
        names: of the sums, in order.
    """

    def __init__(self, loss: str | PerSample, metrics: Sequence[str | PerSample] | None) -> None:
        if not callable(loss) and loss not in LOSSES:
            raise ModeconnError(
                f"loss is {loss!r}: expected one of {', '.join(LOSSES)}, or a callable"
            )
        if metrics is None:
            metrics = ("loss", "error") if loss in (*_LABELLED, "bce") else ("loss",)
        if isinstance(metrics, str) or callable(metrics):
            metrics = (metrics,)
        self.loss = loss
        self.names: list[str] = []
        self._custom: dict[str, PerSample] = {}
        for metric in metrics:
            if callable(metric):
                name = getattr(metric, "__name__", type(metric).__name__)
                self._custom[name] = metric
            else:
                name = metric
                _check_metric(metric, loss)
            if name in self.names:
                raise ModeconnError(f"metrics has {name!r} twice: expected each once")
            self.names.append(name)
        if not self.names:
            raise ModeconnError("metrics is empty: expected at least one")

    def requests_only(self, losses: Collection[str], metrics: Collection[str]) -> bool:
        """Whether the loss and all metrics are among these names: no callable, nothing else."""
        named = not self._custom and self.loss in losses
        return named and all(name in metrics for name in self.names)

    @property
    def takes_logits(self) -> bool:
        """Whether only the logits count, of a network that returns more than a tensor."""
        return not callable(self.loss) and not self._custom

    @property
    def ignores_log_softmax(self) -> bool:
        """Whether a log_softmax before the loss can be left out: cross-entropy takes it again."""
        return self.requests_only(("cross_entropy",), ("loss", "error", "top5_error"))

    def fit(self, outputs: Any, targets: Tensor) -> Tensor:
        """The targets in the form that `sums` takes.

        Args:
            outputs: of the network, for a few rows.

        Raises:
            ModeconnError: the targets do not fit the outputs.
        """
        errors = "error" in self.names or "top5_error" in self.names
        if callable(self.loss) and not errors:
            return targets
        outputs = logits_of(outputs)
        if not isinstance(outputs, Tensor):
            raise ModeconnError(
                f"the model's output is a {type(outputs).__name__}: loss={self.loss!r} expects a "
                "tensor; pass a callable (outputs, targets) as loss"
            )
        if not callable(self.loss) and self.loss not in _LABELLED:
            return self._fit_numbers(outputs, targets)
        if "top5_error" in self.names and outputs.shape[-1] < 6:
            raise ModeconnError(
                f'the model has {outputs.shape[-1]} classes: metric "top5_error" needs more than 5'
            )
        if self.loss == "next_token":
            return _next(outputs, targets)
        return _labels(outputs, targets)

    def _fit_numbers(self, outputs: Tensor, targets: Tensor) -> Tensor:
        same = targets.shape[1:].numel() == outputs.shape[1:].numel()
        if not targets.is_floating_point() or not same:
            raise ModeconnError(
                f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: "
                f"loss={self.loss!r} expects floating point of the outputs' shape "
                f"{['N', *outputs.shape[1:]]}"
            )
        return targets.to(outputs.dtype).reshape(len(targets), *outputs.shape[1:])

    def zeros(self, points: int, device: torch.device) -> Tensor:
        """Sums to add to, float64 [points, len(names)]."""
        return torch.zeros(points, len(self.names), dtype=torch.float64, device=device)

    def counts(self, targets: Tensor) -> Tensor:
        """The numbers that sums are divided by for a mean, float64 [len(names)].

        They are samples, or, where each sample has several labels, labels that count.

        Args:
            targets: as `fit` returned them.
        """
        labels = len(targets)
        if targets.dim() > 1 and self.loss in _LABELLED:
            labels = int((targets != IGNORED).sum())
        counts = [len(targets) if name in self._custom else labels for name in self.names]
        return torch.tensor(counts, dtype=torch.float64, device=targets.device)

    def finish(self, means: np.ndarray) -> dict[str, np.ndarray]:
        """The results by name, from the means [points, len(names)]."""
        values = {name: means[:, i].copy() for i, name in enumerate(self.names)}
        if "perplexity" in values:
            with np.errstate(over="ignore"):
                values["perplexity"] = np.exp(values["perplexity"])
        return values

    def sums(self, outputs: Any, targets: Tensor) -> Tensor:
        """Sums over the samples of every metric, float64 [len(names)].

        The perplexity's is that of the loss: `finish` takes the exponential of the mean.
        """
        values = self._of_callables(outputs, targets)
        outputs = logits_of(outputs)
        if callable(self.loss):
            if "error" in self.names or "top5_error" in self.names:
                values["error"] = _argmax_error(outputs, targets)
        elif self.loss in _LABELLED:
            outputs, targets = _by_label(outputs, targets, shifted=self.loss == "next_token")
            values |= _cross_entropy(outputs, targets)
            values["perplexity"] = values["loss"]
        else:
            values |= LOSSES[self.loss](outputs, targets)
        if "top5_error" in self.names:
            values["top5_error"] = _top5_error(outputs, targets)
        return torch.stack([values[name].sum(dtype=torch.float64) for name in self.names])

    def _of_callables(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """The user's metrics and loss, checked."""
        values = {name: custom(outputs, targets) for name, custom in self._custom.items()}
        if callable(self.loss):
            values["loss"] = self.loss(outputs, targets)
        for name, value in values.items():
            _check_per_sample(name, value, len(targets))
        return values


def _check_metric(metric: str, loss: str | PerSample) -> None:
    """Raises a ModeconnError for a metric that is unknown, or that the loss does not go with."""
    if metric not in METRICS:
        raise ModeconnError(
            f"metric {metric!r} is unknown: expected one of {', '.join(METRICS)}, or a callable"
        )
    if metric in ("error", "top5_error") and loss == "mse":
        raise ModeconnError(
            f'metric {metric!r} is for classes, and loss="mse" has none: expected metrics=("loss",)'
        )
    if metric == "perplexity" and loss not in _LABELLED:
        raise ModeconnError(
            'metric "perplexity" is that of class labels: expected loss to be '
            + " or ".join(_LABELLED)
        )
    if metric == "top5_error" and loss == "bce":
        raise ModeconnError('metric "top5_error" is for class labels, and loss="bce" has none')


def logits_of(outputs: Any) -> Any:
    """The field `logits` of an output that has one, as Hugging Face's do; else the output."""
    logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else outputs


def _check_per_sample(name: str, value: Any, samples: int) -> None:
    if not isinstance(value, Tensor) or value.shape != (samples,):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModeconnError(
            f"{name} gives {shape} for {samples} samples: expected one number per sample, "
            f'[{samples}] (reduction="none" in PyTorch\'s losses)'
        )


def _by_label(outputs: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Logits [M, classes] and labels [M] of all samples, tokens or pixels that have a label."""
    if labels.dim() == 1:
        return outputs, labels
    if shifted:
        outputs = outputs[:, :-1]
    elif _class_axis(outputs, labels) == 1:
        outputs = outputs.movedim(1, -1)
    outputs, labels = outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1)
    kept = labels != IGNORED
    return (outputs, labels) if bool(kept.all()) else (outputs[kept], labels[kept])


def _class_axis(outputs: Tensor, labels: Tensor) -> int | None:
    """The axis of the classes: the last for texts, 1 for images; None if the shapes do not fit."""
    last = outputs.shape[1:-1] == labels.shape[1:]
    first = outputs.shape[2:] == labels.shape[1:]
    if outputs.dim() != labels.dim() + 1 or not (last or first):
        return None
    if last and first:  # as many classes as places: texts have one axis of places, images two
        return -1 if labels.dim() == 2 else 1
    return -1 if last else 1


def _next(outputs: Tensor, targets: Tensor) -> Tensor:
    """The labels of texts, [N, length - 1]: the tokens but the first."""
    texts = outputs.dim() == 3 and targets.dim() == 2 and outputs.shape[1] == targets.shape[1]
    if not texts or targets.shape[1] < 2:
        raise ModeconnError(
            f"outputs have shape {['N', *outputs.shape[1:]]} and targets {list(targets.shape)}: "
            'loss="next_token" needs [N, length, vocabulary] and [N, length], of two tokens at '
            "least"
        )
    return _labels(outputs[:, :-1], targets[:, 1:])


def _labels(outputs: Tensor, targets: Tensor) -> Tensor:
    """Class labels as int64, checked: [N], or one per token or pixel, where -100 is none."""
    axis = _class_axis(outputs, targets)
    if outputs.dim() < 2 or (axis is None and (targets.dim() > 1 or outputs.dim() > 2)):
        raise ModeconnError(
            f"outputs have shape {['N', *outputs.shape[1:]]} and targets {list(targets.shape)}: "
            "class labels need [N, classes] and [N], or [N, length, classes] and [N, length]; "
            "pass a callable (outputs, targets) as loss"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.dim() == 0:
        raise ModeconnError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: "
            "class labels are integers [N]"
        )
    several = targets.dim() > 1
    given = targets[targets != IGNORED] if several else targets
    if given.numel():
        _check_range(given, outputs.shape[axis or -1], f", and {IGNORED} for no label" * several)
    return targets.long()


def _check_range(labels: Tensor, classes: int, others: str) -> None:
    """Raises a ModeconnError for a label that is no class; `others` is for the end of its text."""
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ModeconnError(
            f"label {low if low < 0 else high} is out of range: the model has {classes} classes, "
            f"0 to {classes - 1}{others}"
        )


def _cross_entropy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """-log softmax(logits)[label], and whether the label is not the first maximum.

    The shift by the maximum, which both share, keeps the loss of a confident network accurate:
    log(1 + tiny) is not computed from large numbers.
    """
    shifted = logits - logits.amax(1, keepdim=True)
    own = shifted.gather(1, labels[:, None]).squeeze(1)
    loss = shifted.exp().sum(1).log() - own
    # On a CPU argmax over a short axis is slow; with one maximum per sample the label is right
    # where its shifted logit is zero. On a GPU argmax is fast, and to ask for the count would be to
    # wait for the device.
    if labels.device.type == "cpu" and int((shifted == 0).sum()) == len(labels):
        wrong = own != 0
    else:
        wrong = _argmax_error(logits, labels)
    return {"loss": loss, "error": wrong}


def _argmax_error(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1) != labels


def _top5_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is not among the five largest; torch.topk decides ties."""
    return (logits.topk(5, dim=1).indices != labels[:, None]).all(1)


def _per_sample(values: Tensor) -> Tensor:
    """The mean over all axes but the first."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def _mse(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"loss": _per_sample((outputs - targets).square())}


def _bce(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    wrong = ((logits > 0) != (targets > 0.5)).to(logits.dtype)
    return {"loss": _per_sample(loss), "error": _per_sample(wrong)}


LOSSES: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "next_token": _cross_entropy,
    "mse": _mse,
    "bce": _bce,
}
METRICS = ("loss", "error", "top5_error", "perplexity")
