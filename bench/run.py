"""The side-by-side table: modeconn against what people do by hand, in one run on one machine.

    python bench/run.py                                   the line between two MNIST networks,
                                                          101 points, 60,000 samples
    python bench/run.py --samples 6000 --points 11 --json out.json
    python bench/run.py --vgg --samples 10000 --points 21      two slim VGG-11 on CIFAR-10
    python bench/run.py --resnet --samples 2000 --points 21    two ResNet-20 of CIFAR-10's shape
    python bench/run.py --resnet networks:densenet28 --samples 2000 --points 21
                                                          or another of bench/networks.py
    python bench/run.py --gpt --samples 500 --points 21        two small GPT, random tokens
    python bench/run.py --dropin                          planes by loss_landscapes and by its
                                                          drop-in
    python bench/run.py --recompute --samples 2000 --points 21 batch-norm statistics of all points
                                                          of the ResNet line
    python bench/run.py --plane --samples 6000 --points 25     25 × 25 points of a plane through
                                                          three MNIST networks
    python bench/run.py --curves --samples 5000           steps of fit_curve against Garipov's; with
                                                          --vgg, --resnet, --gpt, --steps 100
    python bench/run.py --accuracy                        also the distance from a float64 pass per
                                                          point, at every point
    python bench/run.py --models                          common models of torchvision, timm and
                                                          transformers, those that are installed
    python bench/run.py --chain                           chains whose segments move dead units, or
                                                          the last layer

Contenders take turns, each turn timed on its own; the minimum over the repeats is shown. A pass per
point costs the same at every point, so the slow peers are timed on a few points and quoted per
point. "Peak" is the fastest float32 matrix product (2048³, all threads) that PyTorch reaches in the
same run; its share is of the arithmetic that the contender's way of working needs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import curves
import dropin
import models
import numpy as np
import passes
import torch
from table import Contender, machine, measured, show, timed

import modeconn as mc
import peers
import workloads
from modeconn.backends import NAMES
from modeconn.files.writing import atomic_write


def workload(options: argparse.Namespace) -> workloads.Workload:
    """Returns the line that the options name."""
    if options.model:
        return workloads.random_line(options.model, options.samples)
    if options.resnet:
        if options.curves:
            return workloads.trained_resnet_line(options.samples)
        return workloads.resnet_line(options.samples, options.resnet)
    named = {"vgg": workloads.vgg_line, "gpt": workloads.gpt_line}
    chosen = [make for name, make in named.items() if getattr(options, name)]
    return (chosen or [workloads.mnist_line])[0](options.samples)


def line(options: argparse.Namespace) -> dict[str, Any]:
    """Times a line: modeconn at all points, the others at a few."""
    work = workload(options)
    ours = np.linspace(0, 1, options.points)
    plan = mc.explain(work.model, work.path, work.x[:4], options.points)
    results: dict[str, Any] = {}
    able = passes.backends(work, options)

    def one_pass(backend: str) -> Callable[[], Any]:
        return lambda: results.update(
            {backend: mc.evaluate(work.model, work.path, (work.x, work.y), ours, backend=backend)}
        )

    contenders: dict[str, Contender] = {
        f"modeconn ({name})": (one_pass(name), len(ours), plan.flops * len(work.x) / len(ours))
        for name in able
    }
    naive = plan.program.naive_flops * len(work.x)
    contenders |= _others(work, options, naive)
    report = {"workload": work.name, "source": work.source, "points": options.points}
    report |= measured(contenders, options.repeats, options.warm)
    show(report)
    if options.accuracy:
        report["accuracy"] = accuracy(work, results, options)
    return report


def _others(
    work: workloads.Workload, options: argparse.Namespace, naive: float
) -> dict[str, Contender]:
    """Returns the peers that suit a workload."""
    rows = work.rows
    others: dict[str, peers.Peer] = {"DataLoader loop, batch 100": peers.dataloader_loop}
    if work.x.dim() == 4:
        others["channels_last loop, batch 128"] = peers.channels_last_loop
    elif work.x.is_floating_point():
        others["whole tensor at once"] = peers.whole_tensor
    others |= {f"functional_call, {n} rows": peers.functional_chunks(n) for n in rows}
    others[f"vmap, 8 points, {rows[-2]} rows"] = peers.vmap_points(8, rows[-2])
    contenders: dict[str, Contender] = {}
    for name, peer in others.items():
        points = np.linspace(0, 1, 8 if name.startswith("vmap") else options.peer_points)
        call = functools.partial(peer, work.model, work.path, work.x, work.y, points)
        contenders[name] = (call, len(points), naive)
    return contenders


def accuracy(
    work: workloads.Workload, results: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Measures the distances of the losses from a float64 pass per point, at every point."""
    t = np.linspace(0, 1, options.points)
    model = copy.deepcopy(work.model).double()
    points = [_doubled(point) for point in work.path.control_points]
    exact, exact_error = peers.functional_chunks(1000)(
        model, mc.Line(*points), work.x.double(), work.y, t
    )
    plain, plain_error = peers.functional_chunks(1000)(work.model, work.path, work.x, work.y, t)
    figures: dict[str, Any] = {"plain float32": _distance(plain, plain_error, exact, exact_error)}
    for name, result in results.items():
        figures[f"modeconn ({name})"] = _distance(result.loss, result.error, exact, exact_error)
    print(f"\n{'against float64':<30}{'loss, relative':>15}{'errors that differ':>20}")
    for name, (loss, error) in figures.items():
        print(f"{name:<30}{loss:>15.2e}{error * len(work.x):>20.0f}")
    print(f"passes over the data: {next(iter(results.values())).passes}")
    return figures


def _doubled(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def _distance(
    loss: np.ndarray, error: np.ndarray, exact: np.ndarray, exact_error: np.ndarray
) -> tuple[float, float]:
    """Returns the largest relative error of the losses and the largest error of the error rates."""
    relative = np.abs(loss - exact).max() / np.abs(exact).max()
    return float(relative), float(np.abs(error - exact_error).max())


def chain(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times a further point on segments that move dead units, or the last layer."""
    reports = []
    for backend, kind in itertools.product(options.backends, ("rewrite", "swing")):
        work = workloads.mnist_chain(options.samples, 2, kind)
        forward, few, many = (
            seconds(work, points, backend, options.repeats) for points in ([0.0], 21, 2021)
        )
        per_point = max(0.0, many - few) / 2000
        once = [
            mc.explain(work.model, work.path, work.x[:4], points).network_flops
            for points in (21, 2021)
        ]
        times = f"forward pass {1e3 * forward:.0f} ms, a further point {1e6 * per_point:.0f} us"
        print(f"{work.name} ({backend}): {times}")
        ratio = forward / max(per_point, 1e-9)
        flops = f"{once[0]:.0f} and {once[1]:.0f} FLOP a sample"
        print(f"  = 1/{ratio:.0f} of it; the network: {flops}")
        report = {"workload": work.name, "backend": backend, "machine": machine()}
        reports.append(report | {"forward_s": forward, "per_point_s": per_point})
    return reports


def seconds(work: workloads.Workload, points: Any, backend: str, repeats: int) -> float:
    """Measures the least time of an evaluation."""
    return min(
        timed(lambda: mc.evaluate(work.model, work.path, (work.x, work.y), points, backend=backend))
        for _ in range(repeats)
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--points", type=int, default=101)
    parser.add_argument(
        "--peer-points",
        type=int,
        default=3,
        help="points at which a pass per point is timed (default 3)",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--model",
        metavar="SPEC",
        help="two random networks of this kind instead, such as mlp:784-512x3-10",
    )
    parser.add_argument(
        "--vgg", action="store_true", help="the two slim VGG-11 on CIFAR-10 instead"
    )
    parser.add_argument(
        "--resnet",
        nargs="?",
        const="resnet20",
        metavar="SPEC",
        help="two random networks with norms on CIFAR-10 instead: ResNet-20, or for example "
        "networks:pre_resnet20",
    )
    parser.add_argument("--gpt", action="store_true", help="two small GPT instead")
    parser.add_argument(
        "--recompute",
        action="store_true",
        help="batch-norm statistics recomputed along the ResNet line",
    )
    parser.add_argument(
        "--plane",
        action="store_true",
        help="a plane of --points × --points through three MNIST networks",
    )
    parser.add_argument("--backends", nargs="+", default=list(NAMES), choices=("auto", *NAMES))
    parser.add_argument(
        "--warm",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run everything once, untimed, first",
    )
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--chain", action="store_true")
    parser.add_argument(
        "--dropin", action="store_true", help="planes by other packages and by the drop-ins"
    )
    parser.add_argument(
        "--models", action="store_true", help="common models, against the best plain loop each"
    )
    parser.add_argument(
        "--curves", action="store_true", help="steps of a curve's training, ours and Garipov's"
    )
    parser.add_argument("--steps", type=int, default=100, help="of a curve (default 100)")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


def main() -> None:
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    kinds = {
        "chain": chain,
        "recompute": passes.recompute,
        "plane": passes.plane,
        "dropin": dropin.compare,
        "models": models.compare,
        "curves": lambda options: curves.compare(workload(options), options),
    }
    chosen = [run for name, run in kinds.items() if getattr(options, name)]
    report = (chosen or [line])[0](options)
    if options.json:
        atomic_write(
            options.json, lambda stream: stream.write(json.dumps(report, indent=1).encode())
        )


if __name__ == "__main__":
    main()
