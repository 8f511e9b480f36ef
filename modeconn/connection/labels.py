"""Checks of class labels, the targets of a network's outputs."""

from __future__ import annotations

from torch import Tensor

from modeconn.errors import ModeconnError


def class_labels(targets: Tensor) -> Tensor:
    """Returns targets as class labels, int64 [N].

    Raises:
        ModeconnError: they are no integers, one for each sample.
    """
    if targets.is_floating_point() or targets.dim() != 1:
        raise ModeconnError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}: "
            "class labels are integers [N]"
        )
    return targets.long()


def check_range(labels: Tensor, outputs: int, name: str) -> None:
    """Raises unless labels are those of a network's outputs.

    Args:
        labels: int64 [N].
        outputs: how many it has.
        name: of the network.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= outputs:
        raise ModeconnError(f"labels run from {low} to {high}, but {name} has {outputs} outputs")


def check_several(labels: Tensor) -> None:
    """Raises where all samples are of one class: then there is nothing to learn."""
    if bool((labels == labels[0]).all()):
        raise ModeconnError(
            f"all {len(labels):,} samples have the label {int(labels[0])}: "
            "expected at least two classes"
        )
