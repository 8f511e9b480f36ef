"""Your own model, data loader, loss and metric.

Any `nn.Module` is evaluated as it is. The loader here gives dicts, whose "labels" are the targets
and whose other keys are arguments of `forward`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import modeconn as mc


class Net(nn.Module):
    """Classifies an image with the help of one more number."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4))
        self.classify = nn.Linear(8 * 2 * 2 + 1, 10)

    def forward(self, image: Tensor, brightness: Tensor) -> Tensor:
        return self.classify(torch.cat([self.features(image).flatten(1), brightness], 1))


def confidence(outputs: Tensor, targets: Tensor) -> Tensor:
    """A metric: one number per sample."""
    return outputs.softmax(1).amax(1)


def trained(seed: int, loader: DataLoader) -> Net:
    """Trains a network from a seed."""
    torch.manual_seed(seed)
    net = Net()
    adam = torch.optim.Adam(net.parameters(), lr=2e-2)
    for _ in range(5):
        for batch in loader:
            adam.zero_grad()
            outputs = net(batch["image"], batch["brightness"])
            nn.functional.cross_entropy(outputs, batch["labels"]).backward()
            adam.step()
    return net


def main() -> None:
    digits = mc.datasets.load("digits")
    samples = [{"image": x, "brightness": x.mean().reshape(1), "labels": y} for x, y in digits]
    loader = DataLoader(samples, batch_size=100)

    nets = [trained(seed, loader) for seed in (1, 2)]
    line = mc.Line(*nets)
    result = mc.evaluate(nets[0], line, loader, points=11, metrics=["loss", confidence])
    for t, loss, sure in zip(result.t, result.loss, result.metric("confidence")):
        print(f"t = {t:.1f}  loss {loss:.3f}  confidence {sure:.3f}")


if __name__ == "__main__":
    main()
