"""Plain PyTorch for Goldstein's surfaces: a pass over the data per point, by its rules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def drawn(net: nn.Module, kind: str, ignore: str, norm: str) -> list[Tensor]:
    """A direction from PyTorch's own generator, row by row."""
    values = list(net.parameters()) if kind == "weights" else list(net.state_dict().values())
    direction = [torch.randn(value.size()) for value in values]
    for d, w in zip(direction, values):
        w = w.detach().float()
        if d.dim() <= 1:
            d.copy_(torch.zeros_like(w) if ignore == "biasbn" else w)
        elif norm in ("filter", "dfilter"):
            for row, of_net in zip(d, w):
                row.mul_((of_net.norm() if norm == "filter" else 1.0) / (row.norm() + 1e-10))
        elif norm == "layer":
            d.mul_(w.norm() / d.norm())
        elif norm == "dlayer":
            d.div_(d.norm())
        elif norm == "weight":
            d.mul_(w)
    return direction


def moved(
    net: nn.Module, directions: Sequence[Sequence[np.ndarray]], step: Sequence[float], kind: str
) -> nn.Module:
    """A copy of the network, in float64, at a point."""
    network = copy.deepcopy(net).double().eval()
    values = list(network.parameters()) if kind == "weights" else network.state_dict().values()
    with torch.no_grad():
        for i, value in enumerate(values):
            if value.is_floating_point():
                value.add_(sum(c * torch.tensor(d[i]).double() for c, d in zip(step, directions)))
    return network


def loss_and_accuracy(
    network: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], loss_name: str
) -> tuple[float, float]:
    """Mean loss, and accuracy in percent."""
    total, correct, count = 0.0, 0, 0
    for x, y in loader:
        with torch.no_grad():
            outputs = network(x.double())
        if loss_name == "mse":
            one_hot = F.one_hot(y, outputs.shape[1]).double()
            loss = F.mse_loss(outputs.softmax(1), one_hot)
        else:
            loss = F.cross_entropy(outputs, y)
        total += loss.item() * len(y)
        correct += int((outputs.argmax(1) == y).sum())
        count += len(y)
    return total / count, 100.0 * correct / count


def filled(
    surf_file: str | Path,
    net: nn.Module,
    directions: Sequence[Sequence[np.ndarray]],
    loader: Iterable[tuple[Tensor, Tensor]],
    kind: str = "weights",
    loss_name: str = "crossentropy",
    keys: tuple[str, str] = ("train_loss", "train_acc"),
) -> int:
    """Fill in a surface file as the original does, point by point; return how many there were."""
    import h5py

    with h5py.File(surf_file, "r+") as opened:
        x = opened["xcoordinates"][:]
        y = opened["ycoordinates"][:] if "ycoordinates" in opened else None
        shape = x.shape if y is None else (len(x), len(y))
        for key in keys:
            if key not in opened:
                opened[key] = -np.ones(shape)
        losses, accuracies = (opened[key][:] for key in keys)
        steps = [x] if y is None else [part.ravel() for part in np.meshgrid(x, y)]
        left = np.flatnonzero(losses.ravel() <= 0)
        for i in left:
            network = moved(net, directions, [axis[i] for axis in steps], kind)
            loss, accuracy = loss_and_accuracy(network, loader, loss_name)
            losses.ravel()[i], accuracies.ravel()[i] = loss, accuracy
        opened[keys[0]][:], opened[keys[1]][:] = losses, accuracies
    return len(left)
