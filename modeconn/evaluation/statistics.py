"""Batch-norm statistics recomputed from the data, for all points of a path in one pass.

Between two networks, interpolated running statistics are not those of the activations of the
network in between. Re-estimating them point by point, as Garipov et al. 2018 do (`update_bn`),
costs a pass for each point. Here every norm of the captured graph is replaced by one that
normalizes by the statistics of the batch, as in training, and returns them. That graph is planned
like any other, and runs for all points at once (backends/native/statistics.py).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from modeconn.backends.native.statistics import make_statistics
from modeconn.backends.precision import without_autocast
from modeconn.capture.export import prepare
from modeconn.capture.graph import Graph
from modeconn.capture.noise import Noise
from modeconn.capture.training_mode import training_graph
from modeconn.data.batches import Batch, as_batches
from modeconn.data.inputs import Inputs, moved, rows
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import device_of, dtype_of, fitted, positive
from modeconn.evaluation.ends import capture_for
from modeconn.evaluation.resume import Stage, Unfinished
from modeconn.parameters.paths import Path
from modeconn.parameters.points import Points
from modeconn.parameters.state import State
from modeconn.plan.planner import make_program

# Rows of a batch, and so of each estimate, by default: a usual batch size of trainings, whose
# running statistics these are to be like.
BATCH_SIZE = 128


class Recomputed(NamedTuple):
    """The statistics of norms along a path.

    Attributes:
        tables: values [T, channels] by name of a running mean or variance; empty for a network
            without batch norm.
        backend: "native" where the engine computed any of them, "reference" otherwise, "" where
            there are none.
    """

    tables: dict[str, Tensor]
    backend: str


class NormStatistics:
    """The batch norms of a network along a path, planned for their statistics to be recomputed.

    Args:
        graph: the captured network.
        path: of its checkpoints.
        points: t values; the distinct ones are evaluated in rising order.
        dtype: of the computation.
        device: of the computation.
        backend: "auto" or "native" for the C++ engine, where it knows the network.
        noise_seed: of what the network draws at random, as for `evaluate`.

    Attributes:
        by_samples: whether a batch's estimate counts as often as it has rows; by default all
            batches count alike.
    """

    by_samples = False

    def __init__(
        self,
        graph: Graph,
        path: Path,
        points: np.ndarray,
        dtype: torch.dtype,
        device: torch.device,
        backend: str = "auto",
        noise_seed: int | None = None,
    ) -> None:
        self.dtype, self.device = dtype, device
        training, self.names = training_graph(graph)
        if self.names:
            self.program = make_program(
                training,
                path,
                points,
                dtype=dtype,
                device=device,
                frozen=frozenset(),
            ).drawing(Noise(noise_seed))
            self.engine = make_statistics(backend, self.program, dtype, device)

    def recompute(
        self,
        batches: Iterable[Batch],
        stage: Stage,
        limit: int | None = None,
        seen: Callable[[int], None] = lambda count: None,
    ) -> Recomputed:
        """Recompute the running statistics of every norm at every point, in one pass over the data.

        They are those that PyTorch has after `reset_running_stats()` with `momentum=None` and a
        pass in training mode: the means, over the batches, of a batch's mean and of its unbiased
        variance, while each norm normalizes by the batch's own statistics. All other modules
        (dropout, say) stay in evaluation mode. Where they are `by_samples`, the means are weighted,
        as with a momentum of n / (N + n) for a batch of n rows behind N.

        Args:
            batches: the training data, in its order.
            stage: the pass, of which some batches may be done already.
            limit: the most batches to read.
            seen: called with the number of rows of each batch that is done.

        Raises:
            ModeconnError: a batch from which no variance can be estimated.
        """
        if not self.names:
            return Recomputed({}, "")
        sums = {name: total.to(self.device) for name, total in stage.sums.items()}
        total_weight = samples = 0
        for number, (inputs, _) in enumerate(itertools.islice(batches, limit)):
            x = moved(inputs, self.dtype, self.device)
            weight = rows(inputs) if self.by_samples else 1
            self.program.noise.row, samples = samples, samples + rows(inputs)
            if not stage.has(x):
                self._add_checked(x, number, weight, sums)
                stage.done(sums)
            total_weight += weight
            seen(rows(inputs))
        # a norm counts as often as it is called
        used = Counter(itertools.chain.from_iterable(self.names))
        means = {name: total / (total_weight * used[name]) for name, total in sums.items()}
        tables = {name: mean.to(self.dtype) for name, mean in means.items()}
        return Recomputed(tables, self.engine.name)

    def _add_checked(self, x: Inputs, number: int, weight: int, sums: dict[str, Tensor]) -> None:
        try:
            self._add(x, weight, sums)
        except ModeconnError:
            raise
        except ValueError as error:
            raise ModeconnError(
                f'buffers="recompute": batch {number} has {rows(x)} rows, and a norm cannot '
                f"estimate a variance from it ({str(error).splitlines()[0]}): choose a batch_size "
                "that leaves no such batch"
            ) from error

    def _add(self, x: Inputs, weight: int, sums: dict[str, Tensor]) -> None:
        """Add the statistics of a batch at every point, times its weight, to the sums."""
        values = self.engine.shared(x)
        for segment in self.program.segments:
            statistics = self.engine.statistics(segment, values, rows(x))
            named = zip(
                itertools.chain.from_iterable(self.names),
                itertools.chain.from_iterable(statistics),
                strict=True,
            )
            for name, value in named:
                if name not in sums:
                    shape = len(self.program.points), *value.shape[1:]
                    sums[name] = torch.zeros(shape, dtype=torch.float64, device=value.device)
                sums[name][segment.point_indices] += value.double() * weight


@without_autocast
def network_at(
    model: nn.Module,
    path: Path,
    t: Points,
    data: Any = None,
    *,
    batch_size: int | None = None,
    batches: int | None = None,
    precision: str = "float32",
) -> State:
    """Return the network at one point of a path, as a state dict.

    Args:
        model: the architecture; it is left as it was.
        path: of checkpoints that fit the model.
        t: the point.
        data: data to recompute the norms' running statistics from; None to interpolate them with
            the weights.
        batch_size: rows of a batch of the data, 128 by default.
        batches: the most batches of the data to read.
        precision: of the statistics' computation.
    """
    state = path.at(t)
    if data is None:
        return state
    points = path.points([t] if path.dim == 1 and np.ndim(t) == 0 else t)
    dtype, device = dtype_of(precision), device_of(None, path)
    runner = prepare(model, dtype, device)
    stream = iter(as_batches(data, batch_size or BATCH_SIZE))
    with torch.no_grad(), Unfinished(None, {}).stage("statistics") as stage:
        first = next(stream)
        graph = capture_for(path, runner, moved(first[0], dtype, device))
        norms = NormStatistics(graph, path, points, dtype, device)
        found, _ = norms.recompute(itertools.chain([first], stream), stage, batches)
    return state | {name: table[0].to(state[name].dtype) for name, table in found.items()}


def recomputed(
    model: nn.Module,
    path: Path,
    t: Points,
    data: Any,
    *,
    batch_size: int | None = None,
    batches: int | None = None,
    precision: str = "float32",
) -> State:
    """Return the network at one point of a path, its norms' running statistics recomputed.

    They are those that `evaluate` has there with `buffers="recompute"`: load the state into the
    model to use the network elsewhere, or save it as a checkpoint.

    Args:
        model: the architecture; it is left as it was.
        path: of checkpoints that fit the model.
        t: the point.
        data: the training data.
        batch_size: rows of a batch, each of which gives one estimate; 128 by default.
        batches: the most batches to read.
        precision: "float32" or "float64".

    Returns:
        A state dict. Of a network without batch norm it is `path.at(t)`.

    Raises:
        ModeconnError: bad input, or a batch from which no variance can be estimated.
    """
    if data is None:
        raise ModeconnError("data is None: expected the data to recompute the statistics from")
    model = fitted(model, path)
    size, most = positive("batch_size", batch_size), positive("batches", batches)
    return network_at(model, path, t, data, batch_size=size, batches=most, precision=precision)


def placeholders(graph: Graph, path: Path, points: int) -> dict[str, Tensor]:
    """Return statistics that are different at every point, for a plan without data."""
    _, names = training_graph(graph)
    start = path.control_points[0]
    tables = {}
    for name in itertools.chain.from_iterable(names):
        like = start.get(name, graph.constants.get(name))
        if like is not None:
            column = torch.arange(1.0, points + 1).view(-1, *[1] * like.dim())
            tables[name] = column.expand(points, *like.shape)
    return tables
