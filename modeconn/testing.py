"""Checks of the user's own model: all that modeconn relies on, in the manner of check_estimator.

from modeconn.testing import check_model
print(check_model(model, (inputs, targets)))
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modeconn.capture.export import capture
from modeconn.capture.graph import Graph
from modeconn.capture.opaque import Opaque
from modeconn.capture.rows import rows_are_independent
from modeconn.capture.trial import Runner, loaded, output_of, saved_tensors
from modeconn.data.batches import as_batches
from modeconn.data.inputs import Inputs, leaves, moved, rows
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.sameness import same_function
from modeconn.metrics import Head, PerSample
from modeconn.parameters.paths import Line

# Where a line is compared with plain float64, and how far apart they may be: orders of summation
# differ, and networks amplify rounding. A wrong rule is off by far more.
_POINTS, _TOLERANCE = (0.0, 0.4, 1.0), 1e-9
# The other end of the line is the model with each weight changed by so much of its size.
_CHANGE = 0.1


@dataclass(frozen=True)
class Check:
    """One thing that modeconn relies on.

    Attributes:
        name: of the check.
        passed: whether it holds; a model for which it does not may still be evaluated rightly.
        text: what was found, in plain words.
    """

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class ModelReport:
    """Holds what `check_model` found; print it."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        return "\n".join(
            f"{'✓' if check.passed else '✗'} {check.name:<{width}}  {check.text}"
            for check in self.checks
        )


def check_model(
    model: nn.Module, data: Any, *, loss: str | PerSample = "cross_entropy", batch_size: int = 64
) -> ModelReport:
    """Check on a model what modeconn relies on, and its numbers against plain PyTorch in float64.

    Args:
        model: any module; it is left as it was.
        data: (inputs, targets), as for `evaluate`; the first batch is used.
        loss: as for `evaluate`.
        batch_size: rows of the batch.

    Returns:
        A report in plain words.

    Raises:
        ModeconnError: the model does not run on the data, or the data are no such thing.
    """
    x, y = next(iter(as_batches(data, batch_size)))
    before = _digest([*saved_tensors(model).values(), *leaves(x), y])
    runner = Runner(model, torch.float64)
    double = moved(x, torch.float64, y.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = capture(runner, double)
        checks = [_pure(graph), _deterministic(graph), _captured(graph), _rows(graph, rows(x))]
        checks += _numbers(runner, double, y, loss)
    unchanged = before == _digest([*saved_tensors(model).values(), *leaves(x), y])
    text = "model and data are bit for bit what they were" if unchanged else "something was changed"
    return ModelReport((*checks, Check("untouched", unchanged, text)))


def _pure(graph: Graph) -> Check:
    functions = [node.function for node in graph.nodes]
    fresh = [part for part in functions if isinstance(part, Opaque) and part.fresh is not None]
    text = "eval() and forward change nothing that a later output depends on"
    if fresh:
        text = f"{graph.fallback}: it runs from a fresh copy at each point, which is slow"
    return Check("pure", not fresh, text)


def _deterministic(graph: Graph) -> Check:
    drawn = [node.source or node.op for node in graph.nodes if node.random]
    text = "two runs give equal outputs"
    if graph.random or drawn:
        where = f" ({drawn[0]})" if drawn else ""
        text = f"it draws random numbers in eval mode{where}: results differ from run to run"
    return Check("deterministic", not (graph.random or drawn), text)


def _captured(graph: Graph) -> Check:
    text = f"as a graph of {len(graph.nodes)} operations"
    if graph.fallback:
        text = f"not: {graph.fallback}"
    elif graph.closed:
        text = f"but for {'; '.join(graph.closed)}"
    return Check("captured", not graph.fallback and not graph.closed, text)


def _rows(graph: Graph, count: int) -> Check:
    if graph.mixes_rows:
        return Check("rows", False, "a sample's output depends on the others of its batch")
    proved = rows_are_independent(graph)
    text = "proved to be independent" if proved else f"found independent in a batch of {count}"
    return Check("rows", True, text)


def _numbers(runner: Runner, x: Inputs, y: Tensor, loss: str | PerSample) -> list[Check]:
    """The losses of a line to a changed model, and its ends, against plain float64."""
    start = runner.state()
    generator = torch.Generator().manual_seed(0)
    end = {name: _changed(value, generator) for name, value in start.items()}
    line = Line(start, end)
    result = evaluate(
        runner.model,
        line,
        (x, y),
        _POINTS,
        loss=loss,
        precision="float64",
        progress=False,
        distributed=False,
    )
    head = Head(loss, ("loss",))
    worst = 0.0
    for t, got in zip(_POINTS, result.loss.tolist()):
        outputs = output_of(loaded(runner.copy(), line.at(t)), x)
        labels = head.fit(outputs, head.counted(x, y))
        exact = float(head.sums(outputs, labels)[0] / head.counts(labels)[0])
        worst = max(worst, abs(got - exact) / max(abs(exact), 1e-12))
    ends = all(torch.equal(line.at(0.0)[name], value) for name, value in start.items())
    bits = "t = 0 is the given network, bit for bit" if ends else "t = 0 is another network"
    own = {name: value.clone() for name, value in saved_tensors(runner.model).items()}
    loads = same_function(runner.model, own, (x, y))
    text = f"a copy that loads its state dict is {loads}"
    agreement = f"losses at t = {_POINTS} are within {worst:.1e} of plain PyTorch in float64"
    return [
        Check("ends", ends, bits),
        Check("loads", loads.same, text),
        Check("agreement", worst <= _TOLERANCE, agreement),
    ]


def _changed(value: Tensor, generator: torch.Generator) -> Tensor:
    """Another value near one, with its sign, so that variances stay possible."""
    if not value.is_floating_point():
        return copy.copy(value)
    noise = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value)
    return value * (1 + _CHANGE * noise)


def _digest(tensors: Iterable[Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
