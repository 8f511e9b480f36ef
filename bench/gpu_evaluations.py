"""Whole evaluations of a line: modeconn's backends against a loop, vmap and torch.compile.

All take the same data on the device. A pass per point costs the same at every point, so the slow
ways are timed on a few points, and all are quoted per point. A backend's losses are compared with a
float64 pass at three points, on the first rows.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

import modeconn as mc
from gpu_cases import Case, Context
from gpu_timing import wall_milliseconds
from modeconn.backends.precision import products
from modeconn.models import build
from modeconn.parameters.paths import Path

# The model, one input's shape, and samples.
Sizes = tuple[str, tuple[int, ...], int]
# By name: the sizes that are measured, and tiny ones for a dry run.
WORKLOADS: dict[str, tuple[Sizes, Sizes]] = {
    "MLP 784-245x10-10": (("mlp:784-245x10-10", (784,), 60_000), ("mlp:5-4x2-3", (5,), 4)),
    "MLP 784-1024x10-10": (("mlp:784-1024x10-10", (784,), 60_000), ("mlp:5-4-3", (5,), 4)),
    "MLP 784-64x2-10, 256 rows": (("mlp:784-64x2-10", (784,), 60_000), ("mlp:5-4-3", (5,), 8)),
    "VGG-11": (("vgg11", (3, 32, 32), 10_000), ("vgg11:width=2", (3, 32, 32), 2)),
    "ResNet-18": (("resnet18", (3, 32, 32), 10_000), ("resnet20:width=2", (3, 8, 8), 2)),
    "GPT": (
        ("gpt:vocab=256,context=128,width=256,layers=4,heads=4", (128,), 512),
        ("gpt:vocab=7,context=4,width=4,layers=1,heads=1", (4,), 2),
    ),
}
# Points of our backends; the many are left out where the few show that they take too long.
POINTS = (16, 128, 1024)
BATCH = 4096
# Rows of a batch where kernels are so short that starting them counts: the case for CUDA graphs.
SMALL_BATCH, SMALL_BATCH_DRY = 256, 1


class Workload:
    """Two random networks, the line between them, and data on the device."""

    def __init__(self, name: str, context: Context) -> None:
        spec, row, samples = WORKLOADS[name][context.dry]
        self.device = context.device
        self.model, start, end = (build(spec).to(self.device).eval() for _ in range(3))
        self.path: Path = mc.Line(start, end)
        generator = torch.Generator().manual_seed(0)
        self.text = spec.startswith("gpt")
        vocabulary = int(spec.split("vocab=")[1].split(",")[0]) if self.text else 0
        if self.text:
            x = torch.randint(0, vocabulary, (samples, *row), generator=generator)
            self.x = self.y = x.to(self.device)
        else:
            self.x = torch.randn(samples, *row, generator=generator).to(self.device)
            classes = 3 if context.dry and spec.startswith("mlp") else 10
            self.y = torch.randint(0, classes, (samples,), generator=generator).to(self.device)
        self.loss = "next_token" if self.text else "cross_entropy"
        self.small = name.endswith("rows")
        self.batch = 64 if self.text else BATCH
        if self.small:
            self.batch = SMALL_BATCH_DRY if context.dry else SMALL_BATCH

    def evaluate(self, points: Any, **options: Any) -> mc.PathResult:
        """Evaluates by modeconn."""
        options = {"loss": self.loss, "metrics": ("loss", "error"), "buffers": "start", **options}
        if self.small:
            options["batch_size"] = self.batch
        return mc.evaluate(self.model, self.path, (self.x, self.y), points, **options)

    def total(self, outputs: Tensor, rows: slice) -> Tensor:
        """Sums loss and errors of a batch's logits, as every peer does."""
        labels = self.y[rows]
        if self.text:
            outputs, labels = outputs[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(outputs, labels, reduction="sum")
        return torch.stack([loss, (outputs.argmax(1) != labels).sum()])

    def batches(self) -> list[slice]:
        starts = range(0, len(self.x), self.batch)
        return [slice(start, min(start + self.batch, len(self.x))) for start in starts]

    def loop(
        self, network: Callable[[Tensor], Tensor], model: nn.Module
    ) -> Callable[[np.ndarray], list[list[float]]]:
        """Returns a pass per point: it loads the weights and runs the batches."""

        def run(t: np.ndarray) -> list[list[float]]:
            sums: list[Any] = []
            with torch.inference_mode():
                for value in t:
                    model.load_state_dict(self.path.at(value))
                    sums.append(0)
                    for rows in self.batches():
                        sums[-1] = sums[-1] + self.total(network(self.x[rows]), rows).double()
            return torch.stack(sums).tolist()  # type: ignore[no-any-return]

        return run

    def by_vmap(self, t: np.ndarray) -> list[list[float]]:
        """Evaluates all points at once, over stacked weights; batches are smaller by as much."""
        states = [self.path.at(value) for value in t]
        stacked = {}
        for key in states[0]:
            stacked[key] = torch.stack([state[key] for state in states])

        def one(state: dict[str, Tensor], inputs: Tensor) -> Any:
            return functional_call(self.model, state, (inputs,), tie_weights=False)

        network = vmap(one, in_dims=(0, None))
        sums: Any = 0
        step = max(1, self.batch // len(t))
        with torch.no_grad():
            for i in range(0, len(self.x), step):
                rows = slice(i, min(i + step, len(self.x)))
                of_points = [
                    self.total(outputs, rows) for outputs in network(stacked, self.x[rows])
                ]
                sums = sums + torch.stack(of_points).double()
        return sums.tolist()  # type: ignore[no-any-return]


def cases(context: Context) -> dict[str, Case]:
    """Cases per workload: our backends in each precision and number of points, then the peers."""
    made: dict[str, Case] = {}
    share = context.seconds / (8 * len(WORKLOADS))
    for name in WORKLOADS:
        for precision in ("float32", "tf32", "bf16"):
            made[f"{name}: triton {precision}"] = _ours(context, name, "triton", precision, share)
        made[f"{name}: reference float32"] = _ours(context, name, "reference", "float32", share)
        if name.endswith("rows"):
            made[f"{name}: triton tf32, CUDA graphs"] = _with_graphs(
                _ours(context, name, "triton", "tf32", share)
            )
        if name.startswith("MLP") and "245" in name and not context.dry:
            made[f"{name}: cuda tf32"] = _ours(context, name, "cuda", "tf32", share)
        for peer in ("loop", "vmap", "torch.compile"):
            made[f"{name}: {peer} tf32"] = _peer(context, name, peer)
    return made


def _ours(context: Context, name: str, backend: str, precision: str, seconds: float) -> Case:
    def run() -> dict[str, Any]:
        work = Workload(name, context)
        if context.dry and precision != "float32" and backend == "reference":
            return {"skipped": "needs a GPU"}
        options: dict[str, Any] = {"backend": backend, "precision": precision}
        few = np.linspace(0, 1, 2 if context.dry else 3)
        error = _distance(work, few, options)
        per_point: dict[int, float] = {}
        started = time.monotonic()
        for points in POINTS[: 1 if context.dry else len(POINTS)]:
            count = 2 if context.dry else points
            if (
                per_point
                and (time.monotonic() - started) + 3e-3 * count * min(per_point.values()) > seconds
            ):
                break  # it would take more than its share
            ms = wall_milliseconds(
                lambda count=count: work.evaluate(count, **options),
                context.device,
                1 if context.dry else 2,
            )
            per_point[count] = ms / count
        text = ", ".join(f"T {points}: {ms:.4g} ms" for points, ms in per_point.items())
        note = f"{text}; loss {error:.0e}"
        return {
            "ms": min(per_point.values()),
            "per_point_ms": per_point,
            "loss_error": error,
            "note": note,
        }

    return run


def _with_graphs(case: Case) -> Case:
    def run() -> dict[str, Any]:
        with mock.patch.dict(os.environ, MODECONN_CUDA_GRAPHS="1"):
            return case()

    return run


def _distance(work: Workload, t: np.ndarray, options: dict[str, Any]) -> float:
    """Returns the largest relative error of the loss against float64, on the first rows."""
    part = copy.copy(work)
    part.x, part.y = work.x[:256], work.y[:256]
    got = part.evaluate(t, **options).loss
    part.x = part.x.double() if part.x.is_floating_point() else part.x
    exact = part.evaluate(t, backend="reference", precision="float64").loss
    return float(np.abs(got / exact - 1).max())


def _peer(context: Context, name: str, peer: str) -> Case:
    def run() -> dict[str, Any]:
        work = Workload(name, context)
        if peer == "torch.compile" and context.dry:
            return {"skipped": "compiling takes too long for a dry run"}
        points = 2 if context.dry or peer != "vmap" else 8
        t = np.linspace(0, 1, points)
        model = copy.deepcopy(work.model)
        if peer == "vmap":
            call = work.by_vmap
        else:
            call = work.loop(torch.compile(model) if peer == "torch.compile" else model, model)
        with products("tf32", context.device):
            call(t[:1] if peer != "vmap" else t)  # warms up, compiles
            ms = (
                wall_milliseconds(lambda: call(t), context.device, repeats=1 if context.dry else 2)
                / points
            )
        return {"ms": ms, "note": f"per point, of {points}"}

    return run
