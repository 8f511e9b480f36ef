"""The workloads that are timed: networks, paths and data, real ones where they are at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path as File

import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn.models import build
from modeconn.parameters.paths import Path

ROOT = File(__file__).resolve().parent.parent
SHARED = File(os.environ.get("MODECONN_SHARED", ROOT.parent / "shared"))


@dataclass(frozen=True)
class Workload:
    """An evaluation.

    Attributes:
        source: whether networks and data are real.
        rows: how many at a time suit plain PyTorch.
    """

    name: str
    model: nn.Module
    path: Path
    x: Tensor
    y: Tensor
    source: str
    rows: tuple[int, ...] = (500, 1000, 2000)


def _between(spec: str, name: str) -> tuple[nn.Module, Path, str]:
    """Returns a model, the line between two networks of its kind, and the networks' source.

    The networks are trained from different seeds, or random where there are no files of them.
    """
    files = [SHARED / "checkpoints" / f"{name}-seed{seed}.safetensors" for seed in (1, 2)]
    if all(file.exists() for file in files):
        return build(spec), mc.Line(*files), "trained networks"
    return build(spec), mc.Line(build(spec), build(spec)), "random networks"


def mnist_line(samples: int) -> Workload:
    """The line between the two 10 × 245 MNIST networks, over the training set."""
    model, path, networks = _between("mlp:784-245x10-10", "mnist-fcn-10x245")
    x, y, data = _mnist(samples)
    return Workload(
        f"MNIST 784-245x10-10, {len(x)} samples, line", model, path, x, y, f"{networks}, {data}"
    )


def vgg_line(samples: int) -> Workload:
    """The line between the two slim VGG-11, over CIFAR-10's training set."""
    model, path, networks = _between("vgg11:width=16", "cifar10-vgg11-w16")
    x, y, data = _cifar10(samples)
    name = f"CIFAR-10 slim VGG-11, {len(x)} images, line"
    return Workload(name, model, path, x, y, f"{networks}, {data}", rows=(128, 500))


def trained_resnet_line(samples: int) -> Workload:
    """The line between the two ResNet-20, over CIFAR-10's training set."""
    model, path, networks = _between("resnet20:width=16", "resnet20-w16")
    x, y, data = _cifar10(samples)
    name = f"CIFAR-10 ResNet-20, {len(x)} images, line"
    return Workload(name, model, path, x, y, f"{networks}, {data}", rows=(128, 500))


def resnet_line(samples: int, spec: str = "resnet20") -> Workload:
    """The line between two random networks, whose norms have random statistics as trained ones."""
    torch.manual_seed(0)
    model, *ends = (build(spec) for _ in range(3))
    for network in ends:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    x, y, data = _cifar10(samples)
    name = f"CIFAR-10 {spec}, {len(x)} images, line"
    return Workload(name, model, mc.Line(*ends), x, y, f"random networks, {data}", rows=(128, 500))


class Tokens(nn.Module):
    """A language model whose logits are [N, vocabulary, length], as F.cross_entropy takes them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(tokens).transpose(1, 2)
        return logits


def gpt_line(
    samples: int, spec: str = "gpt:vocab=65,context=128,width=128,layers=4,heads=4"
) -> Workload:
    """The line between two random GPT of nanoGPT's small shape, over random texts of 128 tokens."""
    torch.manual_seed(0)
    model, *ends = (Tokens(build(spec)) for _ in range(3))
    for network in ends:
        for parameter in network.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    texts = torch.randint(0, 65, (samples, 129))
    name = f"{spec}, {samples} texts of 128 tokens, line"
    return Workload(
        name,
        model,
        mc.Line(*ends),
        texts[:, :-1],
        texts[:, 1:].contiguous(),
        "random networks, random data",
        rows=(8, 32, 128),
    )


def mnist_plane(samples: int) -> Workload:
    """The plane through the two 10 × 245 MNIST networks and a third one with random weights."""
    line = mnist_line(samples)
    torch.manual_seed(0)
    path = mc.Plane.through(*line.path.control_points, build("mlp:784-245x10-10"))
    name = f"MNIST 784-245x10-10, {len(line.x)} samples, plane"
    return Workload(
        name, line.model, path, line.x, line.y, f"{line.source}, the third network random"
    )


def random_line(spec: str, samples: int) -> Workload:
    """The line between two random networks of a built-in kind, over random data."""
    model, start, end = (build(spec) for _ in range(3))  # peers load weights into the model
    width = next(p for p in model.parameters()).shape[1]
    torch.manual_seed(0)
    x, y = torch.randn(samples, width), torch.randint(0, 10, (samples,))
    return Workload(
        f"{spec}, {samples} samples, line",
        model,
        mc.Line(start, end),
        x,
        y,
        "random networks, random data",
    )


def mnist_chain(samples: int, segments: int, kind: str) -> Workload:
    """A chain from the MNIST network; segments move dead units ("rewrite") or the last layer."""
    line = mnist_line(samples)
    start = {key: value.clone() for key, value in line.path.control_points[0].items()}
    start["20.weight"][:, 122:] = 0
    points = [start]
    generator = torch.Generator().manual_seed(0)
    for _ in range(segments):
        point = {key: value.clone() for key, value in points[-1].items()}
        key, rows = (
            ("18.weight", slice(122, None)) if kind == "rewrite" else ("20.weight", slice(None))
        )
        noise = 0.05 * torch.randn(point[key].shape, generator=generator)
        point[key][rows] += noise[rows] * (1.0 if kind == "rewrite" else (torch.arange(245) < 122))
        points.append(point)
    name = f"MNIST 784-245x10-10, {samples} samples, chain of {segments} segments, {kind}"
    return Workload(name, line.model, mc.PolyChain(points), line.x, line.y, line.source)


def _mnist(samples: int) -> tuple[Tensor, Tensor, str]:
    roots = [os.environ.get("MODECONN_DATA"), ROOT / ".cache" / "data" / "mnist"]
    for root in filter(None, roots):
        if File(root).is_dir():
            x, y = mc.datasets.load("mnist", root=root).slice(0, samples)
            return x.flatten(1).contiguous(), y, "real data"
    torch.manual_seed(0)
    return (
        torch.randn(samples, 784),
        torch.randint(0, 10, (samples,)),
        "random data of MNIST's shape",
    )


def _cifar10(samples: int) -> tuple[Tensor, Tensor, str]:
    root = ROOT / ".cache" / "data" / "cifar10"
    if root.is_dir():
        x, y = mc.datasets.load("cifar10", root=root).slice(0, samples)
        return x, y, "real data"
    torch.manual_seed(0)
    return (
        torch.randn(samples, 3, 32, 32),
        torch.randint(0, 10, (samples,)),
        "random data of CIFAR-10's shape",
    )
