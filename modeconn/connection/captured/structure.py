"""Answers what a verifier asks of a network's structure, for a network of any architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from modeconn.connection.captured.liveness import Liveness, live_units
from modeconn.connection.captured.magnitude import largest_value
from modeconn.connection.captured.network import CapturedNetwork
from modeconn.connection.captured.rounding import GraphRounding, graph_rounding
from modeconn.connection.captured.segments import (
    classify_captured,
    liveness_between,
    nonzero_at,
)
from modeconn.connection.rounding import groups_of
from modeconn.connection.segment_kinds import Evidence

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class CapturedStructure:
    """A captured graph: units are live where an operation on live units reads them."""

    network: CapturedNetwork

    @staticmethod
    def of(model: nn.Module, sample: Tensor) -> CapturedStructure:
        """Captures a model.

        Raises:
            ModeconnError: its outputs have no certificate; the text says why.
        """
        return CapturedStructure(CapturedNetwork.of(model, sample))

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return self.network.name

    @property
    def classes(self) -> int:
        """The number of outputs."""
        return self.network.classes

    def rows(self, sample: Tensor) -> int:
        """Returns the rows of input whose widest value fits a plain pass's memory."""
        return self.network.block_rows()

    def run(self, state: State, x: Tensor) -> Tensor:
        """Returns the outputs [N, classes] of a plain pass, dead units included."""
        return self.network.run(state, x)

    def classify(self, start: State, stop: State) -> Evidence:
        """Classifies the segment between two states; see `classify_captured`."""
        return classify_captured(self.network, start, stop)

    def largest(self, start: State, stop: State, inputs: Tensor) -> tuple[float, str]:
        """Bounds every value on the segment between two states; see `largest_value`.

        Where no bound is known of some value and no unit is dead, that of the inputs is returned.
        Then nothing is hidden behind a weight of zero: on a swing a value does not move or is
        affine in t, so that it is between its values at the ends, whose outputs are measured.
        """
        graph = self.network.graph
        worst, where = largest_value(graph, start, stop, inputs)
        if worst != worst and liveness_between(self.network, start, stop).whole(graph):
            return float(inputs.abs().max()), "the inputs"
        return worst, where

    def rounding(
        self, points: Sequence[State], evidence: Sequence[Evidence], rows: int, budget: float
    ) -> GraphRounding | None:
        """Returns the bounds of a path, whatever the budget; see `graph_rounding`."""
        graph = self.network.graph

        def live(point: State) -> Liveness:
            return live_units(graph, nonzero_at(graph, point))

        return graph_rounding(graph, points, live, groups_of(evidence))
