"""Data on its way to the device: batch by batch, the next one while the present one is computed, or all of it once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from modeconn.data.inputs import Inputs, apply, leaves, moved

# Of a device's free memory, what a data set that stays there may take.
_SHARE = 0.25


def resident(data: Any, device: torch.device, free: Callable[[], int] | None = None) -> Any:
    """Data that is read more than once, on a CUDA device if it is tensors and fits there; otherwise as it is.

    Args:
        data: as `evaluate` takes it.
        free: bytes that are free on the device.
    """
    if device.type != "cuda" or not isinstance(data, (tuple, list)) or len(data) != 2:
        return data
    inputs, targets = data
    parts = [targets, *(leaves(inputs) if isinstance(inputs, (Tensor, dict, tuple)) else [inputs])]
    if not all(isinstance(part, Tensor) for part in parts):
        return data
    limit = _SHARE * (free() if free else torch.cuda.mem_get_info(device)[0])
    if sum(part.nbytes for part in parts) > limit:
        return data
    return apply(lambda tensor: tensor.to(device), inputs), targets.to(device)


def on_device(
    batches: Iterable[tuple[Inputs, Tensor]],
    fit: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[Inputs, Tensor, Tensor]]:
    """Each batch's inputs and labels on the device, and the labels as they came, for what the host wants to know of them.

    To a CUDA device a batch goes from pinned memory and in a stream of its own, one batch ahead.
    What lies there already stays where it is.

    Args:
        batches: inputs and targets.
        fit: targets to labels, checked; done before they travel, so that the device need not be
            waited for.
        dtype: of floating-point inputs on the device.
    """
    if device.type != "cuda":
        for inputs, targets in batches:
            labels = fit(targets.to(device))
            yield moved(inputs, dtype, device), labels, labels
        return
    side = torch.cuda.Stream(device)
    waiting: tuple[tuple[Inputs, Tensor, Tensor], Any] | None = None
    for inputs, targets in batches:
        labels = fit(targets)
        # inputs on the device may not be ready yet
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            sent = (
                moved(apply(lambda tensor: _sent(tensor, device), inputs), dtype, device),
                _sent(labels, device),
                labels,
            )
            arrived = side.record_event()
        if waiting is not None:
            yield _taken(waiting, device)
        waiting = (sent, arrived)
    if waiting is not None:
        yield _taken(waiting, device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that may still be under way, by way of pinned memory of our own: the source may be filled again."""
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def _taken(
    sent: tuple[tuple[Inputs, Tensor, Tensor], Any], device: torch.device
) -> tuple[Inputs, Tensor, Tensor]:
    """The batch, once it is there; its memory is not given to the next one before it has been used."""
    stream = torch.cuda.current_stream(device)
    (inputs, labels, given), arrived = sent
    stream.wait_event(arrived)
    for tensor in (*leaves(inputs), labels):
        tensor.record_stream(stream)
    return inputs, labels, given
