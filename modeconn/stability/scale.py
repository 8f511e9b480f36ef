"""Finds the scalar factor of outputs that makes the loss smallest: convex in one dimension.

Dropout networks of Kuditipudi et al. 2019 are rescaled by it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Outputs [T, B, C] of T networks and labels [B].
Chunk = tuple[Tensor, Tensor]

# A loss that counts as 0: where a network is right on every sample the loss falls for ever as the
# scale grows.
ENOUGH = 1e-6
# Newton's method takes about ten steps; halving an interval down to the precision, about 60.
_STEPS = 60
# Below this a curvature, or a scale, counts as 0 when it is divided by or compared with.
_TINY_CURVATURE = 1e-300
_TINY_SCALE = 1e-3
# A step changes the scale by no more than so many times its size (or 1).
_LONGEST = 3.0
# The search ends where Newton's step, or the interval, is this small beside the scale: the loss is
# then exact to its square.
_PRECISION = {torch.float32: 1e-6, torch.float64: 1e-10}


def best_scales(chunks: Iterable[Chunk], skip: int = 0) -> Tensor:
    """Minimises the mean cross-entropy of s · z in s, for each network's outputs z.

    Newton's method from s = 1, inside an interval in which the slope changes its sign, halving it
    where Newton's method is slow. The search ends where the step is lost in the outputs' rounding,
    or the loss is at most 1e-6.

    Args:
        chunks: read once per step.
        skip: networks at the beginning that are left out.

    Returns:
        s, float64 [T - skip].
    """
    first = next(iter(chunks))[0]
    count, precision = len(first) - skip, _PRECISION[first.dtype]
    scale = torch.ones(count, dtype=torch.float64)
    low, high = torch.full_like(scale, -torch.inf), torch.full_like(scale, torch.inf)
    before = torch.full_like(scale, torch.inf)
    active = torch.arange(count)
    for _ in range(_STEPS):
        loss, slope, curvature = _moments(chunks, active + skip, scale[active])
        finite = torch.isfinite(loss) & torch.isfinite(slope)
        newton = -slope / curvature.clamp_min(_TINY_CURVATURE)
        longest = _LONGEST * scale[active].abs().clamp_min(1.0)
        step = newton.clamp(-longest, longest)
        small = precision * scale[active].abs().clamp_min(_TINY_SCALE)
        done = ~finite | (newton.abs() <= small) | (loss <= ENOUGH)
        low[active] = torch.where(slope < 0, scale[active], low[active])
        high[active] = torch.where(slope > 0, scale[active], high[active])
        middle = (low[active] + high[active]) / 2
        proposed = scale[active] + step
        slow = slope.abs() > 0.5 * before[active]
        outside = (proposed <= low[active]) | (proposed >= high[active])
        halve = torch.isfinite(middle) & (slow | outside)
        before[active] = slope.abs()
        following = torch.where(halve, middle, proposed)
        done |= high[active] - low[active] <= small
        scale[active] = torch.where(done, scale[active], following)
        active = active[~done]
        if not len(active):
            break
    return scale


def _moments(
    chunks: Iterable[Chunk], which: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes mean loss and its first and second derivative in the scale, summed in float64."""
    sums = torch.zeros(3, len(which), dtype=torch.float64)
    samples = 0
    for outputs, labels in chunks:
        whole = len(which) == len(outputs)
        z = outputs if whole else outputs[which]
        own = labels[None, :, None].expand(len(z), -1, 1)
        # Differences to the own class's output: what remains is accurate where the network is
        # confident.
        z = z - z.gather(2, own)
        scaled = z * scale.to(z)[:, None, None]
        shift = scaled.amax(2, keepdim=True)
        weights = (scaled - shift).exp_()
        total = weights.sum(2, keepdim=True)
        p = weights / total
        mean = (p * z).sum(2)
        sums[0] += (total.log() + shift).squeeze(2).sum(1, dtype=torch.float64)
        sums[1] += mean.sum(1, dtype=torch.float64)
        sums[2] += ((p * z * z).sum(2) - mean.square()).sum(1, dtype=torch.float64)
        samples += len(labels)
    loss, slope, curvature = sums / samples
    return loss, slope, curvature


def losses_and_errors(chunks: Iterable[Chunk], scales: Tensor) -> tuple[Tensor, Tensor]:
    """Computes mean cross-entropy and error of each network's scaled outputs, float64 [T] each."""
    loss = torch.zeros(len(scales), dtype=torch.float64)
    wrong = torch.zeros_like(loss)
    samples = 0
    for outputs, labels in chunks:
        z = outputs.double() * scales[:, None, None]
        own = labels[None, :, None].expand(len(z), -1, 1)
        loss += torch.logsumexp(z - z.gather(2, own), 2).sum(1)
        wrong += (z.argmax(2) != labels).sum(1)
        samples += len(labels)
    return loss / samples, wrong / samples
