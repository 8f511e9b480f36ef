"""Times of calls on a GPU: the median by events, warmed up, the second-level cache flushed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

# More than any second-level cache of today.
_FLUSH_BYTES = 256 << 20


def milliseconds(
    call: Callable[[], Any], device: torch.device, budget: float = 1.0, most: int = 30
) -> float:
    """Measures the median time of a call.

    Args:
        budget: seconds for the measurement, about; at least three calls are timed after one that
            is not.
        most: calls, at most.
    """
    if device.type != "cuda":  # a dry run, where it is enough that the call works
        return wall_milliseconds(call, device, repeats=1)
    call()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    count = max(3, min(most, int(budget / max(time.perf_counter() - started, 1e-6))))
    events = []
    for _ in range(count):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        before.record()
        call()
        after.record()
        events.append((before, after))
    torch.cuda.synchronize(device)
    return sorted(before.elapsed_time(after) for before, after in events)[count // 2]


def wall_milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Measures the least wall time of a call that waits for the device itself."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - started))
    return min(times)
