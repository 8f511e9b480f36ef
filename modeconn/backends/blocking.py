"""Rows of a block, by a model of the cache: on one machine always the same, and so are sums."""

from __future__ import annotations

import itertools
import os

import torch

from modeconn.plan.program import Program, SharedStep, VaryingStep
from modeconn.plan.units import static

# Bytes for a batch, and as much for its shared values, where the caller names no budget.
MEMORY_BUDGET = 128 << 20
# The second level of the cache per core where the system does not say: the least that is common
# today.
_DEFAULT_L2 = 1 << 20
# A matrix product of fewer rows does not amortise the cost of its call.
_ROWS_OF_A_PRODUCT = 128
# Nor do the many small steps of a transformer for fewer samples, or a convolution of fewer images.
_LEAST_SAMPLES, _LEAST_IMAGES = 16, 64
# Bytes that the widest step of a block may take for the sake of those: of long texts over a large
# vocabulary, the logits alone take as much.
_MOST_BYTES = 256 << 20


def block_rows(program: Program, dtype: torch.dtype, device: torch.device, fewest: int = 0) -> int:
    """Rows of which the input and output of the widest step fill the nearer caches.

    That is twice the second level of the cores in use: what does not fit there is still in the
    level behind, and larger blocks cost less per row in operator calls. On a GPU blocks are as
    large as the batch: there the device must be filled.

    Args:
        fewest: rows that a block has at least, unless they are too large altogether.
    """
    if device.type != "cpu":
        return 1 << 30
    varying = itertools.chain.from_iterable(segment.steps for segment in program.segments)
    steps: list[VaryingStep] | list[SharedStep] = list(varying) or program.shared
    item = torch.finfo(dtype).bits // 8
    widest = max(*(2 * step.numel * item for step in steps), 1.0)
    cache = 2 * torch.get_num_threads() * _second_level()
    images = any(step.node.op == "conv2d" for step in steps)
    of_a_product = int(_ROWS_OF_A_PRODUCT // max(1.0, *map(_rows_of_a_product, steps)))
    least = max(fewest, _LEAST_IMAGES if images else _LEAST_SAMPLES, of_a_product)
    return max(1, min(max(least, int(cache // widest)), int(_MOST_BYTES // widest)))


def _rows_of_a_product(step: SharedStep | VaryingStep) -> float:
    """Rows of a linear layer's product for each sample: of a text, its tokens."""
    return step.numel / static(step.node.shape[-1]) if step.node.op == "linear" else 1.0


def _second_level() -> int:
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or _DEFAULT_L2
    except (AttributeError, ValueError, OSError):  # not a glibc system
        return _DEFAULT_L2
