"""Scans by other packages' functions, and by the drop-ins for them: ratios of whole calls.

Where loss_landscapes is installed (`make peers`) it is the peer; else a loop that moves the model
in place and calls the metric, which is what it does at every point.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from table import machine, timed
from torch import nn

import modeconn.dropin.loss_landscapes as ours
from modeconn.dropin.loss_landscapes import contract

# The largest difference that is no mistake, relative to the largest value.
_SAME = 1e-5


def mlp() -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return nn.Sequential(*layers), torch.randn(2000, 784)


def conv_norm() -> tuple[nn.Module, torch.Tensor]:
    widths = [(3, 16, 1), (16, 32, 2), (32, 32, 2)]
    return _with_norms(widths), torch.randn(100, 3, 32, 32)


def small_conv_norm() -> tuple[nn.Module, torch.Tensor]:
    return _with_norms([(1, 8, 1), (8, 16, 2)]), torch.randn(100, 1, 16, 16)


def _with_norms(widths: list[tuple[int, int, int]]) -> nn.Module:
    """A chain of convolutions: channels before and after, and the stride."""
    layers: list[nn.Module] = []
    for before, after, stride in widths:
        layers.append(nn.Conv2d(before, after, 3, stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1][1], 10)]
    model = nn.Sequential(*layers, *tail)
    with torch.no_grad():  # a shift of zeros raises ZeroDivisionError in the package
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.normal_(0.0, 0.1)
    return model.eval()


def smallest() -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)


# By name: the network and its inputs, classes, steps along each axis of the plane.
CASES: dict[str, tuple[Callable[[], tuple[nn.Module, torch.Tensor]], int, int]] = {
    "MLP 784-128-128-10, 2,000 samples": (mlp, 10, 20),
    "conv net with norms, 100 images 3×32×32": (conv_norm, 10, 20),
    "conv net with norms, 100 images 1×16×16": (small_conv_norm, 10, 20),
    "MLP 8-16-4, 64 samples": (smallest, 4, 10),
}


def peer() -> tuple[str, Any]:
    """Find the package, or the loop that stands in for it."""
    try:
        import loss_landscapes
        import loss_landscapes.metrics
    except ImportError:
        return "a loop in place", Loop
    return f"loss_landscapes {contract.installed()}", loss_landscapes


class Loop:
    """The package's planes by a loop that moves the model in place."""

    @staticmethod
    @torch.no_grad()
    def random_plane(model: nn.Module, metric: Any, distance: float, steps: int) -> Any:
        weights = list(model.parameters())
        first = contract.drawn(weights, False)
        ds = []
        for d in (first, contract.orthogonal_to(first, False)):
            d = contract.scaled(contract.normalized(d, weights, "filter"), weights, distance, False)
            ds.append([x / steps for x in d])
        own = [p.detach().clone() for p in weights]
        wrapped = ours.GeneralModelWrapper(model, [model], lambda model, x: model(x))
        data = torch.empty(steps, steps, dtype=torch.float64)
        for i, j, x, y in contract.plane_walk(steps, False):
            for p, w, a, b in zip(weights, own, *ds):
                p.copy_(w + (x - steps / 2) * a + (y - steps / 2) * b)
            data[i, j] = metric(wrapped)
        for p, w in zip(weights, own):
            p.copy_(w)
        return data.numpy()


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures planes of every case, the peer and the drop-in in turn, and prints the ratios."""
    name, library = peer()
    print(f"peer: {name}; whole calls, the least of {options.repeats}")
    print(f"{'':44}{'peer':>9}{'loss':>9}{'ratio':>7}{'first':>9}{'metric':>9}{'ratio':>7}")
    reports = []
    for case, (make, classes, steps) in CASES.items():
        torch.manual_seed(0)
        model, x = make()
        y = torch.randint(classes, (len(x),))
        report = measure(library, model, x, y, steps, options.repeats)
        reports.append({"case": case, "peer": name, "machine": machine(), **report})
        least = {key: min(report[key]) for key in ("peer_s", "loss_s", "metric_s")}
        ratios = [least["peer_s"] / least[key] for key in ("loss_s", "metric_s")]
        print(
            f"{case:44}{least['peer_s']:8.2f}s{least['loss_s']:8.2f}s{ratios[0]:6.1f}x"
            f"{report['first_s']:8.2f}s{least['metric_s']:8.2f}s{ratios[1]:6.1f}x"
        )
    return reports


def measure(
    library: Any, model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, repeats: int
) -> dict[str, Any]:
    """Measures one network: a loss that the evaluator knows, and a metric of one's own."""
    loss = ours.metrics.Loss(nn.CrossEntropyLoss(), x, y)

    def accuracy(wrapped: Any) -> float:
        return (wrapped.forward(x).argmax(1) == y).double().mean().item()

    def plane(of: Any, metric: Any) -> Any:
        torch.manual_seed(1)
        return of.random_plane(model, metric, 1, steps)

    own = {k: v.clone() for k, v in model.state_dict().items()}
    report: dict[str, Any] = {"peer_s": [], "loss_s": [], "metric_s": []}
    report["first_s"] = timed(lambda: plane(ours, loss))  # with the capture, if it pays
    for _ in range(repeats):
        found = {}
        for key, of, metric in (("peer_s", library, loss), ("loss_s", ours, loss)):
            report[key].append(timed(lambda: found.update({key: plane(of, metric)})))  # noqa: B023
            model.load_state_dict(own)  # the package leaves a model where it ended
            model.requires_grad_(True)
        report["metric_s"].append(timed(lambda: plane(ours, accuracy)))
        error = abs(found["peer_s"] - found["loss_s"]).max() / abs(found["peer_s"]).max()
        assert error <= _SAME, f"the values differ by {error:.2g}"
        report["difference"] = float(error)
    return report
