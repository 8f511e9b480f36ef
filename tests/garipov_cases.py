"""A CurveNet's checkpoint, and plain PyTorch loops for its curves, by the rules of its scripts."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loader = Iterable[tuple[Tensor, Tensor]]


def checkpoint(nets: Sequence[nn.Module], kind: str, names: dict[str, str] | None = None) -> dict:
    """The checkpoint of a CurveNet whose bends are these networks.

    Args:
        nets: the networks; the buffers are those of the first.
        kind: "Bezier" or "PolyChain".
        names: what the CurveNet calls modules that have another name in the base model.
    """
    state = {"coeff_layer.range": torch.arange(0.0, len(nets))}
    if kind == "Bezier":
        n = len(nets) - 1
        binom = [float(math.comb(n, k)) for k in range(len(nets))]
        state |= {"coeff_layer.binom": torch.tensor(binom)}
        state["coeff_layer.rev_range"] = torch.arange(float(n), -1, -1)
    for path, module in nets[0].named_modules():
        prefix = f"net.{(names or {}).get(path, path)}"
        for name, _ in module.named_parameters(recurse=False):
            for k, net in enumerate(nets):
                value = getattr(net.get_submodule(path), name)
                state[f"{prefix}.{name}_{k}"] = value.detach().clone()
        for name, buffer in module.named_buffers(recurse=False):
            state[f"{prefix}.{name}"] = buffer.clone()
    return {"epoch": 3, "model_state": state, "optimizer_state": {"state": {}, "param_groups": []}}


def coefficients(kind: str, bends: int, t: float) -> list[float]:
    if kind == "Bezier":
        n = bends - 1
        return [math.comb(n, k) * t**k * (1 - t) ** (n - k) for k in range(bends)]
    return [max(0.0, 1.0 - abs(t * (bends - 1) - k)) for k in range(bends)]


def set_parameters(network: nn.Module, vectors: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), vectors):
            parameter.copy_(value)


def update_bn(loader: Loader, network: nn.Module) -> None:
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
    network.train()
    seen = 0
    for x, _ in loader:
        for norm in norms:
            norm.momentum = len(x) / (seen + len(x))
        with torch.no_grad():
            network(x)
        seen += len(x)


def measured(loader: Loader, network: nn.Module, decay: float) -> tuple[float, float, float]:
    """Mean loss with the regularizer, mean cross-entropy, and accuracy in percent."""
    network.eval()
    loss = nll = correct = count = 0.0
    for x, y in loader:
        with torch.no_grad():
            outputs = network(x)
        value = F.cross_entropy(outputs, y).item()
        nll += value * len(y)
        loss += (value + decay) * len(y)
        correct += int((outputs.argmax(1) == y).sum())
        count += len(y)
    return loss / count, nll / count, 100.0 * correct / count


def at_points(
    base: nn.Module,
    points: Iterable[Sequence[Tensor]],
    loaders: tuple[Loader, Loader],
    decay: Callable[[nn.Module], float],
) -> dict[str, np.ndarray]:
    """The three passes of each point."""
    rows: dict[str, list[float]] = {}
    for vectors in points:
        network = copy.deepcopy(base)
        set_parameters(network, vectors)
        update_bn(loaders[0], network)
        for prefix, loader in zip(("tr", "te"), loaders):
            loss, nll, acc = measured(loader, network, decay(network))
            values = {"loss": loss, "nll": nll, "acc": acc, "err": 100.0 - acc}
            for name, value in values.items():
                rows.setdefault(f"{prefix}_{name}", []).append(value)
    return {name: np.array(values) for name, values in rows.items()}


def eval_curve(
    base: nn.Module,
    state: dict[str, Tensor],
    kind: str,
    loaders: tuple[Loader, Loader],
    num_points: int,
    wd: float,
) -> dict[str, np.ndarray]:
    """What eval_curve.py saves."""
    tensors = [v for name, v in state.items() if name.startswith("net.") and name[-2] == "_"]
    bends = state["coeff_layer.range"].numel()
    ts = np.linspace(0.0, 1.0, num_points)
    points = []
    for t in ts:
        c = coefficients(kind, bends, t)
        groups = [tensors[i : i + bends] for i in range(0, len(tensors), bends)]
        points.append([sum(a * v for a, v in zip(c, group)) for group in groups])
    flat = [np.concatenate([v.numpy().ravel() for v in vectors]) for vectors in points]
    dl = np.array([0.0] + [float(np.linalg.norm(b - a)) for a, b in itertools.pairwise(flat)])

    def decay(network: nn.Module) -> float:
        return 0.5 * wd * sum(float(p.detach().square().sum()) for p in network.parameters())

    arrays = {"ts": ts, "dl": dl, **at_points(base, points, loaders, decay)}
    for name in ("tr_loss", "tr_nll", "tr_err", "te_loss", "te_nll", "te_err"):
        v = arrays[name]
        arrays[f"{name}_min"], arrays[f"{name}_max"], arrays[f"{name}_avg"] = (
            v.min(),
            v.max(),
            v.mean(),
        )
        arrays[f"{name}_int"] = np.sum(0.5 * (v[:-1] + v[1:]) * dl[1:]) / np.sum(dl[1:])
    return arrays


def plane(
    base: nn.Module,
    nets: Sequence[nn.Module],
    kind: str,
    loaders: tuple[Loader, Loader],
    grid_points: int,
    margins: Sequence[float],
    wd: float,
) -> dict[str, np.ndarray]:
    """What plane.py saves."""
    w = [torch.cat([p.detach().flatten() for p in net.parameters()]).numpy() for net in nets]
    u = w[2] - w[0]
    dx = np.linalg.norm(u)
    u = u / dx
    v = w[1] - w[0]
    v = v - np.dot(u, v) * u
    dy = np.linalg.norm(v)
    v = v / dy
    left, right, bottom, top = margins
    alphas = np.linspace(-left, 1 + right, grid_points)
    betas = np.linspace(-bottom, 1 + top, grid_points)

    def place(p: np.ndarray) -> list[float]:
        return [float(np.dot(p - w[0], u)), float(np.dot(p - w[0], v))]

    grid, points = np.zeros((grid_points, grid_points, 2)), []
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(betas):
            grid[i, j] = alpha * dx, beta * dy
            flat = torch.from_numpy(w[0] + alpha * dx * u + beta * dy * v)
            sizes = [p.numel() for p in base.parameters()]
            parts = flat.split(sizes)
            points.append([part.view(p.shape) for part, p in zip(parts, base.parameters())])

    def decay(network: nn.Module) -> float:
        return 0.5 * wd * sum(float(p.detach().norm()) for p in network.parameters())

    ts = np.linspace(0.0, 1.0, 7)
    on_curve = [sum(a * p for a, p in zip(coefficients(kind, len(w), t), w)) for t in ts]
    arrays = {
        "ts": ts,
        "bend_coordinates": np.array([place(p) for p in w]),
        "curve_coordinates": np.array([place(p) for p in on_curve]),
        "alphas": alphas,
        "betas": betas,
        "grid": grid,
    }
    tables = at_points(base, points, loaders, decay)
    return arrays | {k: table.reshape(grid_points, grid_points) for k, table in tables.items()}
