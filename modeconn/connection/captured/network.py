"""A network of any architecture as the verifier sees it: its graph, captured from the module."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modeconn.capture.export import capture, prepare
from modeconn.capture.graph import Graph, Node, Size
from modeconn.capture.mixing import run
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]

# Bytes of the widest value of a plain pass in float64, and the rows that it may have. A ResNet-20
# of width 16 takes 256 rows at a time: 0.018 s of one core a row for all of 56 breakpoints, by 64
# rows 0.021 s, for weights are packed for each batch.
_PLAIN_BUDGET = 32 << 20
_FEWEST_ROWS, _MOST_ROWS = 16, 4096
_BYTES_PER_NUMBER = 8


@dataclass(frozen=True, eq=False)
class CapturedNetwork:
    """A network whose output is [N, classes], one row for each row of its input.

    Attributes:
        graph: its operations.
        name: of the model's class, for messages.
        classes: the number of outputs.
        ties: keys of the state dict that stand for one tensor, group by group.
        others: keys that the network does not read, but for those that are tied to one it reads.
    """

    graph: Graph
    name: str
    classes: int
    ties: tuple[tuple[str, ...], ...]
    others: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, sample: Tensor) -> CapturedNetwork:
        """Captures a model.

        Args:
            model: any module; it is left as it was.
            sample: a few rows of input, of the dtype to compute with.

        Raises:
            ModeconnError: its output is not one tensor [N, classes], depends on the other rows of
                the batch, or on random numbers: such a network has no certificate.
        """
        kind = sample.dtype if sample.is_floating_point() else torch.float32
        graph = capture(prepare(model, kind, sample.device), sample)
        name = type(model).__name__
        _check(graph, name)
        state = model.state_dict()
        ties = _ties(model)
        read = set(itertools.chain.from_iterable(node.entries for node in graph.nodes))
        covered = read.union(*(group for group in ties if not read.isdisjoint(group)))
        assert isinstance(graph.example, Tensor)
        return CapturedNetwork(
            graph,
            name,
            int(graph.example.shape[1]),
            ties,
            tuple(key for key in state if key not in covered),
        )

    def run(self, state: State, x: Tensor) -> Tensor:
        """Computes the outputs [N, classes] by a plain pass, all units included."""
        with torch.no_grad():
            outputs: Tensor = run(self.graph, dict(state), x)
        return outputs

    def block_rows(self, budget: int = _PLAIN_BUDGET) -> int:
        """Returns the number of rows whose widest value fits a budget of bytes."""
        sizes = map(_numbers_a_row, self.graph.nodes)
        rows = budget // (_BYTES_PER_NUMBER * max(1, *sizes))
        return max(_FEWEST_ROWS, min(_MOST_ROWS, rows))


def _check(graph: Graph, name: str) -> None:
    example = graph.example
    if graph.tensor_output is None or not isinstance(example, Tensor) or example.dim() != 2:
        got = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ModeconnError(
            f"{name} cannot be certified: its output is {got}, expected one tensor [N, classes]; "
            "wrap it in a module that returns that"
        )
    drawn = next((node for node in graph.nodes if node.random), None)
    if graph.random or drawn is not None:
        what = "it" if drawn is None else f"{drawn.op} ({drawn.source})"
        raise ModeconnError(f"{name} cannot be certified: {what} draws random numbers")
    if graph.mixes_rows:
        raise ModeconnError(
            f"{name} cannot be certified: a row's output depends on the other rows of its batch"
        )


def _ties(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups the keys of a model's state dict that stand for one parameter or buffer."""
    groups: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            groups.setdefault(id(tensor), []).append(key)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _numbers_a_row(node: Node) -> int:
    return math.prod(d for d in node.shape if not isinstance(d, Size))
