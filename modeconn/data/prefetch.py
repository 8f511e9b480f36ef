"""Data on its way to the device: batch by batch, one ahead of the computation, or all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from modeconn.data.inputs import Inputs, apply, leaves, moved

# The share of a device's free memory that a resident data set may take: the rest is for weights and
# activations, which are not known yet.
_SHARE = 0.25


def resident(data: Any, device: torch.device, free: Callable[[], int] | None = None) -> Any:
    """Move data that is read more than once to a CUDA device, if they are tensors and fit there.

    Args:
        data: as `evaluate` takes it.
        device: of the computation.
        free: returns the bytes that are free on the device.

    Returns:
        The data on the device, or as they are.
    """
    if device.type != "cuda" or not isinstance(data, (tuple, list)) or len(data) != 2:
        return data
    inputs, targets = data
    known = isinstance(inputs, (Tensor, dict, tuple))
    parts = [targets, *(leaves(inputs) if known else [inputs])]
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
    """Yield each batch's inputs and labels on the device, and the labels as they came.

    The host reads the latter, and need not wait for the device. To a CUDA device a batch goes from
    pinned memory and in a stream of its own, one batch ahead. Tensors that are there already stay.

    Args:
        batches: inputs and targets.
        fit: turns targets into labels and checks them, before they travel.
        dtype: of floating-point inputs on the device.
        device: of the computation.
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
    """Begin a copy to the device by way of pinned memory of our own: sources may be refilled."""
    if tensor.device == device:
        return tensor
    if tensor.device.type != "cpu":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor).to(device, non_blocking=True)


def _taken(
    sent: tuple[tuple[Inputs, Tensor, Tensor], Any], device: torch.device
) -> tuple[Inputs, Tensor, Tensor]:
    """Wait for a batch, and keep its memory from the next one until it has been used."""
    stream = torch.cuda.current_stream(device)
    (inputs, labels, given), arrived = sent
    stream.wait_event(arrived)
    for tensor in (*leaves(inputs), labels):
        tensor.record_stream(stream)
    return inputs, labels, given
