"""Two more tables: batch-norm statistics recomputed at every point, and a plane."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from table import Contender, measured, show

import modeconn as mc
import peers
import workloads


def recompute(options: argparse.Namespace) -> dict[str, Any]:
    """Times statistics of all points in two passes over the data, against two for each point."""
    work = workloads.resnet_line(
        options.samples, "vgg11_bn:width=16" if options.vgg else "resnet20"
    )
    ours, few = np.linspace(0, 1, options.points), np.linspace(0, 1, options.peer_points)
    args = (work.model, work.path, work.x, work.y)
    plan = mc.explain(work.model, work.path, work.x[:4], options.points)
    naive = 2 * plan.program.naive_flops * len(work.x)

    def two_passes(backend: str) -> Callable[[], Any]:
        return lambda: mc.evaluate(
            *args[:2], (work.x, work.y), ours, backend=backend, buffers="recompute"
        )

    contenders: dict[str, Contender] = {
        f"modeconn ({name})": (two_passes(name), len(ours), naive)
        for name in backends(work, options, "recompute")
    }
    others = {"re-estimate and test, per point": False, "the same, channels_last": True}
    for name, channels_last in others.items():
        peer = functools.partial(peers.re_estimating(channels_last), *args, few)
        contenders[name] = peer, len(few), naive
    return _report(f"{work.name}, statistics recomputed", work, options, contenders, options.points)


def plane(options: argparse.Namespace) -> dict[str, Any]:
    """Times a grid of points on a plane through three networks, against a pass per point."""
    work = workloads.mnist_plane(options.samples)
    few = np.random.default_rng(0).random((options.peer_points, 2))
    args = (work.model, work.path, work.x, work.y)
    plan = mc.explain(work.model, work.path, work.x[:4], options.points)
    naive, points = plan.program.naive_flops * len(work.x), len(plan.program.inverse)

    def one_pass(backend: str) -> Callable[[], Any]:
        return lambda: mc.evaluate(*args[:2], (work.x, work.y), options.points, backend=backend)

    contenders: dict[str, Contender] = {
        f"modeconn ({name})": (one_pass(name), points, plan.flops * len(work.x) / points)
        for name in backends(work, options)
    }
    others = {
        "DataLoader loop, batch 100": peers.dataloader_loop,
        "whole tensor at once": peers.whole_tensor,
    }
    others |= {f"functional_call, {rows} rows": peers.functional_chunks(rows) for rows in work.rows}
    contenders |= {
        name: (functools.partial(peer, *args, few), len(few), naive)
        for name, peer in others.items()
    }
    return _report(work.name, work, options, contenders, points)


def backends(
    work: workloads.Workload, options: argparse.Namespace, buffers: str = "interpolate"
) -> list[str]:
    """Lists the requested backends that can run the workload."""

    def able(name: str) -> bool:
        try:
            mc.evaluate(
                work.model, work.path, (work.x[:64], work.y[:64]), 2, backend=name, buffers=buffers
            )
        except mc.ModeconnError as error:
            print(f"{name} is left out: {error}")
            return False
        return True

    return list(filter(able, options.backends))


def _report(
    name: str,
    work: workloads.Workload,
    options: argparse.Namespace,
    contenders: dict[str, Contender],
    points: int,
) -> dict[str, Any]:
    report = {"workload": name, "source": work.source, "points": points}
    report |= measured(contenders, options.repeats, options.warm)
    show(report)
    return report
