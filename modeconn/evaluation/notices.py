"""Warnings about networks and results that are otherwise than one would expect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.capture.graph import Graph
from modeconn.capture.noise import is_random
from modeconn.capture.opaque import Opaque
from modeconn.data.inputs import Inputs
from modeconn.errors import warn
from modeconn.metrics import Head
from modeconn.plan.program import Program

# Last operations of networks that are trained with another loss, by the loss that expects logits.
_NO_LOGITS = (
    ("softmax", "cross_entropy"),
    ("softmax", "next_token"),
    ("softmax", "soft_cross_entropy"),
    ("sigmoid", "bce"),
)
# Points that one warning names.
_LISTED = 5


def warn_of_capture(graph: Graph, batch: str, noise_seed: int | None = None) -> None:
    """Warn of a network that runs otherwise than as a captured graph, row by row.

    Args:
        graph: the captured network.
        batch: what a result depends on where a sample's output depends on the other samples of its
            batch.
        noise_seed: of what it draws at random, if there is one.
    """
    if graph.fallback:
        warn(
            "the model runs as it is, once per point, since it could not be captured: "
            f"{graph.fallback}"
        )
    if graph.closed:
        warn(
            "part of the model runs as it is, once per point, since it could not be captured: "
            f"{'; '.join(graph.closed)}"
        )
    if graph.mixes_rows:
        warn(
            "the model's output for a sample depends on the other samples of its batch: "
            f"results depend on {batch}"
        )
    if is_random(graph) and noise_seed is None:
        warn(
            "the model draws random numbers in eval mode: results differ from run to run, and "
            "points by their noise; evaluate(…, noise_seed=0) draws the same at every point"
        )


def warn_of_probabilities(graph: Graph, head: Head) -> None:
    """Warn of a network that ends in what the loss does itself: probabilities are no logits."""
    last = None if graph.tensor_output is None else _last_operation(graph, graph.tensor_output)
    if (last, head.loss) in _NO_LOGITS:
        warn(
            f'the network ends in {last}, and loss="{head.loss}" expects logits, whose {last} it '
            f"takes itself: leave that out, or give the loss of probabilities as a callable"
        )


def _last_operation(graph: Graph, output: int) -> str:
    """Return the operation of a node; a softmax that is written out is one."""
    node = graph.nodes[output]
    first, *others = [graph.nodes[value] for value in node.inputs] or [node]
    if node.op == "exp" and first.op == "log_softmax":
        return "softmax"
    if (
        node.op == "div"
        and first.op == "exp"
        and [(o.op, o.inputs) for o in others] == [("sum", (first.id,))]
    ):
        return "softmax"
    return node.op


def warn_of_stale_statistics(program: Program) -> None:
    """Warn of norms whose interpolated running statistics are not those of their inputs."""
    stale: set[int] = set()
    for segment in program.segments:
        if segment.between.any():
            stale |= segment.stale
    functions = [node.function for node in program.graph.nodes]
    closed = [part for part in functions if isinstance(part, Opaque) and part.statistics()]
    norms = [part.path or "the model" for part in closed]
    norms += [program.graph.nodes[node].source for node in sorted(stale)]
    if not norms:
        return
    more = f" and {len(norms) - 1} more" if len(norms) > 1 else ""
    warn(
        f"batch norms ({norms[0]}{more}) have interpolated running statistics, or those of "
        "control points, which are not those of the networks in between; "
        'buffers="recompute" estimates them from the training data for all points, in one more pass'
    )


class LabelNotices:
    """Warnings of labels that may not be meant as they count, each once."""

    def __init__(self) -> None:
        self._axis = self._padding = False

    def warn(self, head: Head, example: Any, inputs: Inputs, labels: Tensor) -> None:
        """Warn of classes that could be on two axes, and of padding that has labels.

        Args:
            head: the sums of the evaluation.
            example: the network's output for a few rows.
            inputs: a batch.
            labels: as `head.fit` returned them.
        """
        text = None if self._axis else head.ambiguity(example, labels)
        if text is not None:
            self._axis = True
            warn(text)
        if not self._padding and head.labels_padding(inputs, labels):
            self._padding = True
            warn(
                "padding has labels that count: attention_mask is 0 at tokens whose label is not "
                "-100, and results depend on the padding; set such labels to -100"
            )


def warn_of_non_finite(values: Mapping[str, np.ndarray], t: np.ndarray) -> None:
    """Warn of metrics that are NaN or infinite at some points."""
    for name, column in values.items():
        bad = ~np.isfinite(column)
        if not bad.any():
            continue
        first = ", ".join(map(str, t[bad][:_LISTED].tolist()))
        count = int(bad.sum())
        more = f" and {count - _LISTED} more" if count > _LISTED else ""
        warn(f"{name} is not finite at t = {first}{more}", RuntimeWarning)
