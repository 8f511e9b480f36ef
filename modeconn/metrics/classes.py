"""Class labels, of samples, tokens or pixels: where the classes are, cross-entropy and errors."""

from __future__ import annotations

import torch
from torch import Tensor

from modeconn.errors import ModeconnError

# The label of a sample, token or pixel that does not count, as in PyTorch's losses.
IGNORED = -100


def class_axis(outputs: Tensor, labels: Tensor) -> int | None:
    """Return the axis of the classes; None if the shapes do not fit.

    It is 1, as for PyTorch's losses, where that fits ([N, classes, …] with [N, …]), and the last
    otherwise, as in the outputs of most models of texts ([N, length, classes] with [N, length]).
    """
    if outputs.dim() != labels.dim() + 1 or outputs.dim() < 2:
        return None
    if outputs.shape[2:] == labels.shape[1:]:
        return 1
    return -1 if outputs.shape[1:-1] == labels.shape[1:] else None


def is_ambiguous(outputs: Tensor, labels: Tensor) -> bool:
    """Return whether the classes could as well be on the last axis as on axis 1."""
    first = outputs.dim() > 2 and class_axis(outputs, labels) == 1
    return first and outputs.shape[1:-1] == labels.shape[1:]


def fit_labels(outputs: Tensor, targets: Tensor, ignored: int = IGNORED) -> Tensor:
    """Return class labels as int64, checked: [N], or one per token or pixel.

    Args:
        outputs: of the network, for a few rows.
        targets: the user's.
        ignored: the target that stands for no label, which becomes -100.

    Raises:
        ModeconnError: the targets do not fit the outputs.
    """
    axis = class_axis(outputs, targets)
    if targets.is_floating_point() and targets.shape[1:] == outputs.shape[1:]:
        raise ModeconnError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: class labels are "
            'integers [N]; for probabilities of classes pass nn.CrossEntropyLoss(reduction="none") '
            "as loss"
        )
    if axis is None:
        raise ModeconnError(
            f"outputs have shape {['N', *outputs.shape[1:]]} and targets {list(targets.shape)}: "
            "class labels need [N, classes] and [N], [N, classes, …] and [N, …], or "
            "[N, length, classes] and [N, length]; pass a callable (outputs, targets) as loss, and "
            "one as metric for an error"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ModeconnError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: "
            f"class labels are integers [N]; {_remedy(targets)}"
        )
    labels = targets.long()
    counts = labels != ignored
    given = labels[counts]
    if given.numel():
        _check_range(given, outputs.shape[axis], ignored)
    return labels if ignored == IGNORED else labels.masked_fill(~counts, IGNORED)


def _remedy(targets: Tensor) -> str:
    if targets.dtype == torch.bool or bool((targets == targets.round()).all()):
        return "pass targets.long()"
    return "pass a callable (outputs, targets) as loss for probabilities of classes"


def _check_range(labels: Tensor, classes: int, ignored: int) -> None:
    """Raise a ModeconnError for a label that is no class."""
    low, high = (int(v) for v in torch.aminmax(labels))
    if low < 0 or high >= classes:
        raise ModeconnError(
            f"label {low if low < 0 else high} is out of range: the model has {classes} classes, "
            f"0 to {classes - 1}, and {ignored} for no label"
        )


def fit_next(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the labels of texts, [N, length - 1]: the tokens but the first."""
    texts = outputs.dim() == 3 and targets.dim() == 2 and outputs.shape[1] == targets.shape[1]
    if not texts or targets.shape[1] < 2:
        raise ModeconnError(
            f"outputs have shape {['N', *outputs.shape[1:]]} and targets {list(targets.shape)}: "
            'loss="next_token" needs [N, length, vocabulary] and [N, length], of two tokens at '
            "least"
        )
    # one row per token: the classes are on the last axis, whatever the length
    labels = fit_labels(outputs[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    return labels.view(len(targets), -1)


def by_label(
    outputs: Tensor, labels: Tensor, *, shifted: bool, all_count: bool
) -> tuple[Tensor, Tensor]:
    """Return logits [M, classes] and labels [M] of all samples, tokens or pixels that have a label.

    Args:
        outputs: of the network.
        labels: as `fit_labels` returned them, or `fit_next`.
        shifted: whether the labels are those of the tokens after each.
        all_count: whether no label is known to be -100; labels [N] are not looked at then, since
            that would be to wait for a device.
    """
    if labels.dim() == 1 and all_count:
        return outputs, labels
    if shifted:
        outputs = outputs[:, :-1]
    elif labels.dim() > 1 and class_axis(outputs, labels) == 1:
        outputs = outputs.movedim(1, -1)
    outputs, labels = outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1)
    kept = labels != IGNORED
    return (outputs, labels) if bool(kept.all()) else (outputs[kept], labels[kept])


def cross_entropy(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return -log softmax(logits)[label], and whether the label is not the first maximum.

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
        wrong = argmax_error(logits, labels)
    return {"loss": loss, "error": wrong}


def argmax_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether the label is not the first maximum."""
    return logits.argmax(1) != labels


def top5_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Return whether the label is not among the five largest; torch.topk decides ties."""
    return (logits.topk(5, dim=1).indices != labels[:, None]).all(1)


def labels_of_padding(mask: Tensor, labels: Tensor) -> bool:
    """Return whether a token that an attention mask leaves out has a label that counts.

    Args:
        mask: [N, length], 0 for padding.
        labels: as `fit_labels` returned them.
    """
    if mask.dim() != 2 or labels.dim() != 2 or mask.shape != labels.shape:
        return False
    return bool(((mask.to(labels.device) == 0) & (labels != IGNORED)).any())


def without_padding(mask: Tensor, texts: Tensor) -> Tensor:
    """Return texts in which padding does not count as a token to predict.

    Nor does the first token behind padding on the left, which there is nothing to predict from.

    Args:
        mask: [N, length], 0 for padding.
        texts: token numbers [N, length].
    """
    padded = mask.to(texts.device) == 0
    padded[:, 1:] |= padded[:, :-1].clone()
    return texts.masked_fill(padded, IGNORED)
