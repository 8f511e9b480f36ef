"""VGG networks (Simonyan and Zisserman 2015), with torchvision's names for the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modeconn.errors import ModeconnError

# Channels of each convolution as multiples of the first's; 0 is a pooling.
_PLANS = {
    11: (1, 0, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0),
    13: (1, 1, 0, 2, 2, 0, 4, 4, 0, 8, 8, 0, 8, 8, 0),
    16: (1, 1, 0, 2, 2, 0, 4, 4, 4, 0, 8, 8, 8, 0, 8, 8, 8, 0),
    19: (1, 1, 0, 2, 2, 0, 4, 4, 4, 4, 0, 8, 8, 8, 8, 0, 8, 8, 8, 8, 0),
}


class VGG(nn.Module):
    """Convolutions of 3 × 3, five poolings, three linear layers.

    Args:
        depth: 11, 13, 16 or 19, the number of layers with weights.
        norm: whether a batch norm follows each convolution.
        width: channels of the first convolution; the later ones have 2, 4 and 8 times as many.
        hidden: units of the two hidden linear layers; 0 is the usual number, 8·width for "cifar"
            and 64·width for "imagenet" (4096 at full width).
        classes: outputs; 0 is the usual number, 10 or 1000.
        form: "cifar", for images of 32 × 32: one pixel is left after the last pooling, and the
            linear layers ``classifier.0``, ``.2`` and ``.4`` follow at once. "imagenet",
            torchvision's: pooled to 7 × 7, with dropout, ``classifier.0``, ``.3`` and ``.6``.
        channels: of the images.
    """

    def __init__(
        self,
        depth: int = 11,
        norm: bool = False,
        width: int = 64,
        hidden: int = 0,
        classes: int = 0,
        form: str = "cifar",
        channels: int = 3,
    ) -> None:
        super().__init__()
        if depth not in _PLANS:
            raise ModeconnError(f"depth is {depth}: expected one of {', '.join(map(str, _PLANS))}")
        if form not in ("cifar", "imagenet"):
            raise ModeconnError(f"form is {form!r}: expected cifar or imagenet")
        layers: list[nn.Module] = []
        before = channels
        for multiple in _PLANS[depth]:
            if multiple == 0:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            units = multiple * width
            layers += [
                nn.Conv2d(before, units, 3, padding=1),
                *([nn.BatchNorm2d(units)] * norm),
                nn.ReLU(),
            ]
            before = units
        self.features = nn.Sequential(*layers)
        if form == "cifar":
            hidden, classes = hidden or 8 * width, classes or 10
            self.avgpool: nn.Module = nn.Identity()
            self.classifier = nn.Sequential(
                nn.Linear(before, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, classes),
            )
        else:
            hidden, classes = hidden or 64 * width, classes or 1000
            self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
            self.classifier = nn.Sequential(
                nn.Linear(49 * before, hidden),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(hidden, classes),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, classes] of images [N, channels, H, W]."""
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits
