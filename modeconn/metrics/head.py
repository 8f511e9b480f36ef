"""Sums of per-sample numbers at the head of the network, by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.errors import ModeconnError
from modeconn.metrics import classes
from modeconn.metrics.numbers import bce, fit_numbers, mse, soft_cross_entropy
from modeconn.metrics.per_row import PerSample, check_rows, values_of
from modeconn.metrics.torch_losses import TorchLoss, understood
from modeconn.metrics.whole import DatasetMetric

LOSSES: dict[str, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {
    "cross_entropy": classes.cross_entropy,
    "next_token": classes.cross_entropy,
    "mse": mse,
    "bce": bce,
    "soft_cross_entropy": soft_cross_entropy,
}
METRICS = ("loss", "error", "top5_error", "perplexity")
_LABELLED = ("cross_entropy", "next_token")
_OF_NUMBERS = ("mse", "soft_cross_entropy")  # without a metric of right and wrong
_ERRORS = ("error", "top5_error")
Metric = str | PerSample | DatasetMetric


class Head:
    """Sums of per-sample numbers, in float64, so that results are exact means whatever the batches.

    Args:
        loss: "cross_entropy" (class labels, per sample or per token or pixel; those that are -100
            are left out, as in PyTorch), "next_token" (cross-entropy for texts [N, length] whose
            labels are the texts themselves: the outputs at each place are for the token after it;
            what is padding by the inputs' attention_mask does not count),
            "mse", "bce" (logits), "soft_cross_entropy" (targets are weights of the classes
            [N, classes]), a loss of PyTorch's as a module or function, whose mean is that
            of the data set, or a callable (outputs, targets) → losses [N].
        metrics: "loss", "error", "top5_error", "perplexity" (exp of the mean loss), or callables
            (outputs, targets) → [N], which go before ours of the same name, or a `DatasetMetric`;
            None for loss and, where the loss has one, error.

    Attributes:
        names: of the sums, in order.
        whole: metrics of the whole data set by name, which are no sums.
        leaves_out: whether some sample of data with one label each has none that counts.
        of_classes: whether targets are class labels.
    """

    def __init__(self, loss: str | PerSample, metrics: Sequence[Metric] | None) -> None:
        if not callable(loss) and loss not in LOSSES:
            raise ModeconnError(
                f"loss is {loss!r}: expected one of {', '.join(LOSSES)}, or a callable"
            )
        self.loss: str | TorchLoss | PerSample = understood(loss)
        self.of_classes = self.loss in _LABELLED or (
            isinstance(self.loss, TorchLoss) and self.loss.of_classes
        )
        if metrics is None:
            metrics = ("loss", "error") if self.of_classes or self.loss == "bce" else ("loss",)
        if isinstance(metrics, (str, DatasetMetric)) or callable(metrics):
            metrics = (metrics,)
        self.whole: dict[str, DatasetMetric] = {}
        self._custom: dict[str, PerSample] = {}
        order: list[str] = []
        for metric in metrics:
            if isinstance(metric, DatasetMetric):
                name: str = metric.name
                self.whole[name] = metric
            elif callable(metric):
                name = getattr(metric, "__name__", type(metric).__name__)
                self._custom[name] = _called(metric)
            else:
                name = metric
                self._check_metric(name)
            if name in order:
                raise ModeconnError(f"metrics has {name!r} twice: expected each once")
            order.append(name)
        if not order:
            raise ModeconnError("metrics is empty: expected at least one")
        self.names = [name for name in order if name not in self.whole]
        self._order = order
        self._own = [name for name in self.names if name not in self._custom]
        self._errors = [name for name in self._own if name in _ERRORS]
        self._row_by_row: set[str] = set()  # callables that were found to be
        self.leaves_out = False

    def _check_metric(self, metric: str) -> None:
        """Raise a ModeconnError for a metric that is unknown, or that the loss does not go with."""
        if metric not in METRICS:
            hint = ' ("error" is 1 - accuracy)' if "acc" in str(metric) else ""
            raise ModeconnError(
                f"metric {metric!r} is unknown: expected one of {', '.join(METRICS)}{hint}, a "
                "callable of outputs and targets, or mc.DatasetMetric for all samples together"
            )
        of_torch = isinstance(self.loss, TorchLoss) and not self.of_classes
        numbers = of_torch or self.loss in _OF_NUMBERS
        if metric in _ERRORS and numbers:
            raise ModeconnError(
                f"metric {metric!r} is for classes, and loss={self._loss_name} has none: expected "
                'metrics=("loss",)'
            )
        if metric == "perplexity" and self.loss not in _LABELLED:
            raise ModeconnError(
                'metric "perplexity" is that of class labels: expected loss to be '
                + " or ".join(_LABELLED)
            )
        if metric == "top5_error" and self.loss == "bce":
            raise ModeconnError('metric "top5_error" is for class labels, and loss="bce" has none')

    @property
    def _loss_name(self) -> str:
        return self.loss.name if isinstance(self.loss, TorchLoss) else f'"{self.loss}"'

    def requests_only(self, losses: Collection[str], metrics: Collection[str]) -> bool:
        """Whether the loss and all metrics are among these names: no callable, nothing else."""
        named = not self._custom and not self.whole and self.loss in losses
        return named and all(name in metrics for name in self.names)

    def is_own(self, name: str) -> bool:
        """Whether a metric is ours, and no callable of that name."""
        return name in self._own

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
        if callable(self.loss) and not self._errors:
            return targets
        outputs = self._tensor(outputs)
        if not callable(self.loss) and not self.of_classes:
            if isinstance(self.loss, TorchLoss):
                self.loss.check(outputs)
            if self.loss == "soft_cross_entropy" and bool((targets < 0).any()):
                raise ModeconnError(
                    f"targets go down to {float(targets.min()):.4g}: "
                    f"loss={self._loss_name} expects weights of the classes, none below 0"
                )
            return fit_numbers(outputs, targets, self._loss_name)
        if self.loss == "next_token":
            labels = classes.fit_next(outputs, targets)
        elif isinstance(self.loss, TorchLoss):
            self.loss.check(outputs)
            labels = classes.fit_labels(outputs, targets, self.loss.ignored)
        else:
            labels = classes.fit_labels(outputs, targets)
        if labels.dim() == 1:
            self.leaves_out |= bool((labels == classes.IGNORED).any())
        self._check_top5(outputs, labels)
        return labels

    def _tensor(self, outputs: Any) -> Tensor:
        outputs = logits_of(outputs)
        if isinstance(outputs, Tensor):
            return outputs
        kind = type(outputs).__name__
        if callable(self.loss):
            raise ModeconnError(
                f"the model's output is a {kind}: metric {self._errors[0]!r} expects a tensor; "
                "pass a callable (outputs, targets) as metric"
            )
        raise ModeconnError(
            f"the model's output is a {kind}: loss={self._loss_name} expects a tensor; pass a "
            "callable (outputs, targets) as loss"
        )

    def _check_top5(self, outputs: Tensor, labels: Tensor) -> None:
        axis = -1 if self.loss == "next_token" else classes.class_axis(outputs, labels)
        if "top5_error" in self._errors and axis is not None and outputs.shape[axis] < 6:
            raise ModeconnError(
                f"the model has {outputs.shape[axis]} classes: "
                'metric "top5_error" needs more than 5'
            )

    def ambiguity(self, outputs: Any, labels: Tensor) -> str | None:
        """Text on classes that could be on two axes; None where there is one.

        Args:
            outputs: of the network, for a few rows.
            labels: as `fit` returned them.
        """
        outputs = logits_of(outputs)
        asked = self.of_classes or (callable(self.loss) and self._errors)
        if not asked or self.loss == "next_token" or not classes.is_ambiguous(outputs, labels):
            return None
        return (
            f"outputs {['N', *outputs.shape[1:]]} have as many classes as places: axis 1 is taken "
            "for the classes, as PyTorch's losses do, and not the last; where the classes are on "
            "the last (texts), give the model's outputs as outputs.movedim(-1, 1)"
        )

    def labels_padding(self, inputs: Any, labels: Tensor) -> bool:
        """Whether padding, by the inputs' attention_mask, has labels that count.

        Args:
            labels: as `fit` returned them.
        """
        mask = _mask_of(inputs)
        if not self.of_classes or self.loss == "next_token" or mask is None:
            return False
        return classes.labels_of_padding(mask, labels)

    def counted(self, inputs: Any, targets: Tensor) -> Tensor:
        """The targets, of texts without those that are padding by the inputs' attention_mask.

        So "next_token" is the same number whatever texts are padded to, and on which side.
        """
        mask = _mask_of(inputs)
        if self.loss != "next_token" or mask is None or mask.shape != targets.shape:
            return targets
        return classes.without_padding(mask, targets)

    def zeros(self, points: int, device: torch.device) -> Tensor:
        """Sums to add to, float64 [points, len(names)]."""
        return torch.zeros(points, len(self.names), dtype=torch.float64, device=device)

    def counts(self, targets: Tensor) -> Tensor:
        """The numbers that sums are divided by for a mean, float64 [len(names)].

        They are samples; where targets are class labels, labels that count, or their weights.

        Args:
            targets: as `fit` returned them.
        """
        samples = float(len(targets))
        of_labels = of_loss = samples
        if self.of_classes or (callable(self.loss) and self._errors):
            of_labels = float((targets != classes.IGNORED).sum())
        if isinstance(self.loss, TorchLoss) and self.of_classes:
            of_loss = self.loss.count(targets)
        elif self.of_classes:
            of_loss = of_labels
        counts = []
        for name in self.names:
            own = of_labels if name in _ERRORS else of_loss
            counts.append(samples if name in self._custom else own)
        return torch.tensor(counts, dtype=torch.float64, device=targets.device)

    def finish(
        self, means: np.ndarray, whole: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The results by name, in the order that they were requested in.

        Args:
            means: of the sums, [points, len(names)].
            whole: metrics of the whole data set, [points], by name, if there are any.
        """
        values = {name: means[:, i].copy() for i, name in enumerate(self.names)}
        if "perplexity" in self._own:
            with np.errstate(over="ignore"):
                values["perplexity"] = np.exp(values["perplexity"])
        values |= whole or {}
        return {name: values[name] for name in self._order}

    def sums(self, outputs: Any, targets: Tensor) -> Tensor:
        """Sums over the samples of every metric, float64 [len(names)].

        The perplexity's is that of the loss: `finish` takes the exponential of the mean.
        """
        custom = self._of_callables(outputs, targets)
        values = self._of_own(logits_of(outputs), targets) if self._own else {}
        values |= custom
        return torch.stack([values[name].sum(dtype=torch.float64) for name in self.names])

    def _of_own(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Our metrics, per sample or label."""
        values: dict[str, Tensor] = {}
        if self.of_classes or (callable(self.loss) and self._errors):
            outputs, targets = classes.by_label(
                outputs,
                targets,
                shifted=self.loss == "next_token",
                all_count=not self.leaves_out,
            )
        if self.loss in _LABELLED:
            values = classes.cross_entropy(outputs, targets)
            values["perplexity"] = values["loss"]
        elif isinstance(self.loss, str):
            return LOSSES[self.loss](outputs, targets)
        elif isinstance(self.loss, TorchLoss) and "loss" in self._own:
            values["loss"] = self.loss.values(outputs, targets)
        if "error" in self._errors and "error" not in values:
            values["error"] = classes.argmax_error(outputs, targets)
        if "top5_error" in self._errors:
            values["top5_error"] = classes.top5_error(outputs, targets)
        return values

    def _of_callables(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """The user's metrics and loss, checked."""
        functions = dict(self._custom)
        if callable(self.loss) and "loss" in self._own:
            functions["loss"] = self.loss
        values = {}
        for name, function in functions.items():
            values[name] = values_of(name, function, outputs, targets)
            unknown = name not in self._row_by_row
            if unknown and check_rows(name, function, outputs, targets, values[name]):
                self._row_by_row.add(name)
        return values


def _called(metric: PerSample) -> PerSample:
    """A user's metric as it is called: PyTorch's own with weights in the outputs' dtype."""
    made = understood(metric)
    return made if callable(made) else metric


def _mask_of(inputs: Any) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def logits_of(outputs: Any) -> Any:
    """The field `logits` of an output that has one, as Hugging Face's do; else the output."""
    logits = getattr(outputs, "logits", None)
    return logits if isinstance(logits, Tensor) else outputs
