"""How many rows at a time: a model of the cache, so that the same machine always takes the same blocks."""

from __future__ import annotations

import os

import torch

from modeconn.plan.program import Program, SharedStep, VaryingStep
from modeconn.plan.units import static

# Memory for a batch, and as much for its shared values, where the caller names no budget.
MEMORY_BUDGET = 128 << 20
# What is assumed where the machine does not say: per core, and the least that is common today.
_DEFAULT_L2 = 1 << 20
# Fewer rows than this in a matrix product no longer amortise the cost of the call; nor do fewer
# samples, in the many small steps of a transformer.
_LEAST, _FEWEST = 128, 16
# Nor do fewer images in a convolution.
_FEWEST_IMAGES = 64
# Bytes that the widest step of a block may take all the same: the logits of long texts over a large
# vocabulary, say.
_MOST_BYTES = 256 << 20


def block_rows(program: Program, dtype: torch.dtype, device: torch.device, fewest: int = 0) -> int:
    """Rows whose activations, going into and out of the widest step, take up the nearer caches.

    That is twice the second level of the cores in use: what does not fit there is still in the
    level behind, and larger blocks cost less per row in operator calls. On a GPU blocks are as
    large as the batch: there the device must be filled.

    Args:
        fewest: rows that a block has at least, unless they are too large altogether.
    """
    if device.type != "cpu":
        return 1 << 30
    steps = [step for segment in program.segments for step in segment.steps] or program.shared
    item = torch.finfo(dtype).bits // 8
    widest = max(*(2 * step.numel * item for step in steps), 1.0)
    cache = 2 * torch.get_num_threads() * _second_level()
    images = any(step.node.op == "conv2d" for step in steps)
    least = max(
        fewest,
        _FEWEST_IMAGES if images else _FEWEST,
        int(_LEAST // max(1.0, *map(_positions, steps))),
    )
    return max(1, min(max(least, int(cache // widest)), int(_MOST_BYTES // widest)))


def _positions(step: SharedStep | VaryingStep) -> float:
    """Rows of a linear layer's product for each sample: the tokens of a text, say. Convolutions take images as a whole."""
    return step.numel / static(step.node.shape[-1]) if step.node.op == "linear" else 1.0


def _second_level() -> int:
    try:
        return os.sysconf("SC_LEVEL2_CACHE_SIZE") or _DEFAULT_L2
    except (AttributeError, ValueError, OSError):  # not a glibc system
        return _DEFAULT_L2
