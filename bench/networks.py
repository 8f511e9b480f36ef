"""Residual and dense networks for CIFAR-10 as users write them.

For example `python bench/run.py --resnet networks:pre_resnet20`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(before: int, after: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, size // 2, bias=False)


class NormsFirst(nn.Module):
    """A pre-activation block (He et al. 2016): norms and activations before the convolutions."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), _conv(before, after, 3, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(after), _conv(after, after)
        self.short = _conv(before, after, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return self.short(x) + self.conv2(F.relu(self.norm2(y)))  # type: ignore[no-any-return]


class Gated(nn.Module):
    """A block with a gate of channels (Hu et al. 2018).

    Its shortcut has no weights: it takes every other pixel, with channels of zeros around.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(before, after, 3, stride), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = _conv(after, after), nn.BatchNorm2d(after)
        self.squeeze, self.excite = nn.Conv2d(after, after // 4, 1), nn.Conv2d(after // 4, after, 1)
        self.stride, self.more = stride, (after - before) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        short = x
        if self.more:
            pixels = x[:, :, :: self.stride, :: self.stride]
            short = F.pad(pixels, (0, 0, 0, 0, self.more, self.more))
        return F.relu(short + y * gate)


class Dense(nn.Module):
    """A layer of a DenseNet (Huang et al. 2017), with its bottleneck."""

    def __init__(self, before: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(before), _conv(before, 4 * growth, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), _conv(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


def _residual(block: type[NormsFirst] | type[Gated]) -> nn.Sequential:
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [
        block(before, after, 1 if before == after else 2)
        for before, after in itertools.pairwise(widths)
    ]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(
        _conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), *blocks, nn.BatchNorm2d(64), nn.ReLU(), *head
    )


def pre_resnet20() -> nn.Sequential:
    return _residual(NormsFirst)


def se_resnet20() -> nn.Sequential:
    return _residual(Gated)


def densenet28(growth: int = 12) -> nn.Sequential:
    """Three blocks of four layers, between them half the channels on half the pixels."""
    channels = 2 * growth
    layers: list[nn.Module] = [_conv(3, channels)]
    for block in range(3):
        for _ in range(4):
            layers.append(Dense(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if block < 2:
            layers += [_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
