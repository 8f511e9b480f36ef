"""Residual networks (He et al. 2016), with torchvision's names for the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modeconn.errors import ModeconnError

# Depth → blocks in each stage, convolutions in a block, channels of the first stage.
_PLANS = {
    18: ((2, 2, 2, 2), 2, 64),
    34: ((3, 4, 6, 3), 2, 64),
    50: ((3, 4, 6, 3), 3, 64),
    20: ((3, 3, 3), 2, 16),
    32: ((5, 5, 5), 2, 16),
    56: ((9, 9, 9), 2, 16),
}
# Channels at the end of a block of three convolutions, as a multiple of those within.
_EXPANSION = 4


class Block(nn.Module):
    """relu(x + f(x)), with f two convolutions of 3 × 3, or one between two of 1 × 1.

    A batch norm follows each convolution.

    Args:
        before: channels of x.
        units: channels within the block.
        stride: of its convolution of 3 × 3, the first where there are two.
        convolutions: 2 or 3.
    """

    def __init__(self, before: int, units: int, stride: int, convolutions: int) -> None:
        super().__init__()
        if convolutions == 2:
            after = units
            self.conv1 = nn.Conv2d(before, units, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(units)
            self.conv2 = nn.Conv2d(units, units, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(units)
        else:
            after = _EXPANSION * units
            self.conv1 = nn.Conv2d(before, units, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(units)
            self.conv2 = nn.Conv2d(units, units, 3, stride, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(units)
            self.conv3 = nn.Conv2d(units, after, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )
        self.three, self.after = convolutions == 3, after

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, after, H / stride, W / stride] of [N, before, H, W]."""
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.three:
            out = self.bn3(self.conv3(self.relu(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A convolution, three or four stages of residual blocks, the mean over pixels, a linear layer.

    Args:
        depth: 18, 34 or 50, torchvision's with four stages; 20, 32 or 56, He et al.'s for CIFAR-10
            with three. Where the number of channels changes, the shortcut is a convolution of 1 × 1
            with a norm in all of them.
        width: channels of the first stage; the later ones have 2, 4 and 8 times as many. 0 is the
            usual number, 64 or 16.
        classes: outputs; 0 is the usual number, 10 for "cifar" and 1000 for "imagenet".
        form: how it begins. "cifar": a convolution of 3 × 3; "imagenet": one of 7 × 7 with stride
            2, and a pooling.
        channels: of the images.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 0,
        classes: int = 0,
        form: str = "cifar",
        channels: int = 3,
    ) -> None:
        super().__init__()
        if depth not in _PLANS:
            known = ", ".join(map(str, sorted(_PLANS)))
            raise ModeconnError(f"depth is {depth}: expected one of {known}")
        if form not in ("cifar", "imagenet"):
            raise ModeconnError(f"form is {form!r}: expected cifar or imagenet")
        blocks, convolutions, usual = _PLANS[depth]
        width = width or usual
        small = form == "cifar"
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.conv1 = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        before = width
        self.stages = len(blocks)
        for stage, count in enumerate(blocks):
            layers = []
            for index in range(count):
                stride = 2 if stage and not index else 1
                block = Block(before, width << stage, stride, convolutions)
                layers.append(block)
                before = block.after
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(before, classes or (10 if small else 1000))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of images [N, channels, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits
