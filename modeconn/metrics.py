"""What is summed over the samples at the head of the network: losses, errors, and whatever the user adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
            are left out, as in PyTorch), "next_token" (the same for texts [N, length] whose labels
            are the texts themselves: the outputs at each place are for the token after it), "mse",
            "bce" (logits), or a callable (outputs, targets) → losses [N].
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
            name = (
                metric
                if isinstance(metric, str)
                else getattr(metric, "__name__", type(metric).__name__)
            )
            if isinstance(metric, str) and metric not in METRICS:
                raise ModeconnError(
                    f"metric {metric!r} is unknown: expected one of {', '.join(METRICS)}, or a callable"
                )
            if metric in ("error", "top5_error") and loss == "mse":
                raise ModeconnError(
                    f'metric {metric!r} is for classes, and loss="mse" has none: ask for metrics=("loss",)'
                )
            if metric == "perplexity" and loss not in _LABELLED:
                raise ModeconnError(
                    f'metric "perplexity" is that of class labels: expected loss to be {" or ".join(_LABELLED)}'
                )
            if metric == "top5_error" and loss == "bce":
                raise ModeconnError(
                    'metric "top5_error" is for class labels, and loss="bce" has none'
                )
            if name in self.names:
                raise ModeconnError(f"metric {name!r} is asked for twice")
            if callable(metric):
                self._custom[name] = metric
            self.names.append(name)
        if not self.names:
            raise ModeconnError("metrics is empty: at least one is needed")

    @property
    def fused(self) -> bool:
        """The same for a backend that has the sums of all losses of samples."""
        return (
            self.loss in ("cross_entropy", "mse", "bce")
            and not self._custom
            and "perplexity" not in self.names
        )

    @property
    def builtin(self) -> bool:
        """Whether a fused head of a backend may stand in: cross-entropy, error and top-5 error of class labels alone."""
        return self.loss == "cross_entropy" and not self._custom and "perplexity" not in self.names

    @property
    def labelled(self) -> bool:
        """Whether all sums are those of class labels: of samples, tokens, or tokens that follow."""
        return self.loss in _LABELLED and not self._custom

    @property
    def takes_logits(self) -> bool:
        """Whether only the logits count, of a network that returns more than a tensor."""
        return not callable(self.loss) and not self._custom

    def fit(self, outputs: Any, targets: Tensor) -> Tensor:
        """The targets in the form that `sums` takes, checked against the network's output for a few rows.

        Raises:
            ModeconnError: the targets do not fit the outputs.
        """
        labelled = self.loss in _LABELLED or (
            callable(self.loss) and {"error", "top5_error"} & set(self.names)
        )
        if callable(self.loss) and not labelled:
            return targets
        outputs = logits_of(outputs)
        if not isinstance(outputs, Tensor):
            raise ModeconnError(
                f"the model returns a {type(outputs).__name__}, and loss={self.loss!r} takes a tensor: "
                "pass a callable (outputs, targets) as loss"
            )
        if labelled:
            if "top5_error" in self.names and outputs.shape[-1] < 6:
                raise ModeconnError(
                    f'metric "top5_error" needs more than 5 classes, the model has {outputs.shape[-1]}'
                )
            return (
                _next(outputs, targets) if self.loss == "next_token" else _labels(outputs, targets)
            )
        if (
            not targets.is_floating_point()
            or targets.shape[1:].numel() != outputs.shape[1:].numel()
        ):
            raise ModeconnError(
                f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: loss={self.loss!r} expects floating "
                f"point of the outputs' shape {['N', *outputs.shape[1:]]}"
            )
        return targets.to(outputs.dtype).reshape(len(targets), *outputs.shape[1:])

    def zeros(self, points: int, device: torch.device) -> Tensor:
        """Sums to add to, float64 [points, len(names)]."""
        return torch.zeros(points, len(self.names), dtype=torch.float64, device=device)

    def counts(self, targets: Tensor) -> Tensor:
        """What the sums are divided by for a mean, float64 [len(names)]: samples, or tokens with a label.

        Args:
            targets: as `fit` returned them.
        """
        labels = (
            targets
            if targets.dim() == 1 or self.loss not in _LABELLED
            else targets[targets != IGNORED]
        )
        of = {name: len(targets) if name in self._custom else len(labels) for name in self.names}
        return torch.tensor(
            [of[name] for name in self.names], dtype=torch.float64, device=targets.device
        )

    def finish(self, means: np.ndarray) -> dict[str, np.ndarray]:
        """The results by name, from the means [points, len(names)]."""
        values = {name: means[:, i].copy() for i, name in enumerate(self.names)}
        if "perplexity" in values:
            with np.errstate(over="ignore"):
                values["perplexity"] = np.exp(values["perplexity"])
        return values

    def sums(self, outputs: Any, targets: Tensor) -> Tensor:
        """Sums over the samples of every metric, float64 [len(names)]; the perplexity's is that of the loss."""
        values: dict[str, Tensor] = {
            name: custom(outputs, targets) for name, custom in self._custom.items()
        }
        if self._custom or callable(self.loss):
            checked = {
                **values,
                **({"loss": self.loss(outputs, targets)} if callable(self.loss) else {}),
            }
            for name, value in checked.items():
                _check_per_sample(name, value, len(targets))
            values = checked
        outputs = logits_of(outputs)
        if callable(self.loss):
            if {"error", "top5_error"} & set(self.names):
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


def logits_of(outputs: Any) -> Any:
    """The logits of what a network of Hugging Face's returns, and anything else as it is."""
    logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else outputs


def _check_per_sample(name: str, value: Any, samples: int) -> None:
    if not isinstance(value, Tensor) or value.shape != (samples,):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModeconnError(
            f"{name} gives {shape} for {samples} samples: expected one number per sample, [{samples}] "
            '(reduction="none" in PyTorch\'s losses)'
        )


def _by_label(outputs: Tensor, labels: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Logits [M, classes] and labels [M] of everything that has a label: samples, tokens or pixels."""
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
    """Which axis of the outputs has the classes: the last for texts, 1 for images; None where the shapes do not fit."""
    last, first = outputs.shape[1:-1] == labels.shape[1:], outputs.shape[2:] == labels.shape[1:]
    if outputs.dim() != labels.dim() + 1 or not (last or first):
        return None
    if last and first:  # as many classes as places: texts have one axis of places, images two
        return -1 if labels.dim() == 2 else 1
    return -1 if last else 1


def _next(outputs: Tensor, targets: Tensor) -> Tensor:
    """The labels of texts, [N, length - 1]: the tokens but the first."""
    if (
        outputs.dim() != 3
        or targets.dim() != 2
        or outputs.shape[1] != targets.shape[1]
        or targets.shape[1] < 2
    ):
        raise ModeconnError(
            f'outputs have shape {["N", *outputs.shape[1:]]} and targets {list(targets.shape)}: loss="next_token" needs '
            "[N, length, vocabulary] and [N, length], of two tokens at least"
        )
    return _labels(outputs[:, :-1], targets[:, 1:])


def _labels(outputs: Tensor, targets: Tensor) -> Tensor:
    """Class labels as int64, checked: [N], or one per token or pixel, where -100 is none."""
    axis = _class_axis(outputs, targets)
    if outputs.dim() < 2 or (axis is None and (targets.dim() > 1 or outputs.dim() > 2)):
        raise ModeconnError(
            f"outputs have shape {['N', *outputs.shape[1:]]} and targets {list(targets.shape)}: class labels need "
            "[N, classes] and [N], or [N, length, classes] and [N, length]; pass a callable (outputs, targets) as loss"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.dim() == 0:
        raise ModeconnError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: class labels are integers [N]"
        )
    classes = outputs.shape[axis or -1]
    several = targets.dim() > 1
    given = targets[targets != IGNORED] if several else targets
    if not given.numel():
        return targets.long()
    low, high = (int(v) for v in torch.aminmax(given))
    if low < 0 or high >= classes:
        ignored = f", and {IGNORED} for no label" if several else ""
        raise ModeconnError(
            f"label {low if low < 0 else high} is out of range: the model has {classes} classes, 0 to {classes - 1}{ignored}"
        )
    return targets.long()


def _cross_entropy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """-log softmax(logits)[label] and whether the label is not the first maximum, sharing the shifted logits.

    The shift by the maximum keeps the loss of a confident network accurate: log(1 + tiny) is not
    formed from large numbers.
    """
    shifted = logits - logits.amax(1, keepdim=True)
    own = shifted.gather(1, labels[:, None]).squeeze(1)
    loss = shifted.exp().sum(1).log() - own
    # argmax over a short axis is slow; with one maximum per sample the label is right where its
    # shifted logit is zero. On a GPU it is not, and asking for the count would be to wait for the
    # device.
    if labels.device.type == "cpu" and int((shifted == 0).sum()) == len(labels):
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
    return {
        "loss": (outputs - targets).square().flatten(1).mean(1)
        if outputs.dim() > 1
        else (outputs - targets).square()
    }


def _bce(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    wrong = ((logits > 0) != (targets > 0.5)).to(logits.dtype)
    return (
        {"loss": loss.flatten(1).mean(1), "error": wrong.flatten(1).mean(1)}
        if loss.dim() > 1
        else {"loss": loss, "error": wrong}
    )


LOSSES: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "cross_entropy": _cross_entropy,
    "next_token": _cross_entropy,
    "mse": _mse,
    "bce": _bce,
}
METRICS = ("loss", "error", "top5_error", "perplexity")
