"""Answers what a verifier asks of a network's structure, for chains of layers and other graphs.

The proof of a segment has three parts that depend on how the network is built: which of its units
are live, and so which kind of move the segment is; how large values can become on it; and how far
rounding can move the outputs. Whatever answers these can be verified, whether it is a chain or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from modeconn.connection import value_ranges
from modeconn.connection.captured.structure import CapturedStructure
from modeconn.connection.layer_chain import LayerChain, block_rows
from modeconn.connection.rounding import PathRounding, chain_rounding
from modeconn.connection.segment_kinds import Evidence, classify_segment
from modeconn.errors import ModeconnError

State = Mapping[str, Tensor]


class Structure(Protocol):
    """A network as the verifier sees it; states are parameters and buffers that fit it."""

    @property
    def name(self) -> str:
        """Names the model in messages."""

    @property
    def classes(self) -> int:
        """The number of outputs."""

    def rows(self, sample: Tensor) -> int:
        """Returns the rows of input whose widest value fits a plain pass's memory."""

    def run(self, state: State, x: Tensor) -> Tensor:
        """Returns the outputs [N, classes] of a plain pass, dead units included."""

    def classify(self, start: State, stop: State) -> Evidence:
        """Classifies the segment between two states, from the weights alone.

        Raises:
            ModeconnError: it is no rewrite, shift or swing; the text says where and why. Or a
                weight is not finite, or a variance not positive.
        """

    def largest(self, start: State, stop: State, inputs: Tensor) -> tuple[float, str]:
        """Bounds every value of the network on the segment between two states.

        Args:
            inputs: the largest absolute value of each input, [1, …].

        Returns:
            the largest bound, of dead units too and of all t, and where it is; NaN or inf where
            there is none.
        """

    def rounding(
        self, points: Sequence[State], evidence: Sequence[Evidence], rows: int, budget: float
    ) -> PathRounding | None:
        """Returns what bounds the effect of rounding on the outputs along a path.

        Args:
            points: the breakpoints. evidence: of the segments.
            rows: how many there will be. budget: multiply-adds to spend; with less, it is coarser.

        Returns:
            the bounds, for rows at a time; None where some operation's rounding is not known.
        """


@dataclass(frozen=True)
class ChainStructure:
    """A chain of layers: units are live where a live unit above reads them."""

    chain: LayerChain

    @staticmethod
    def of(model: nn.Module, sample: Tensor) -> ChainStructure:
        """Finds the chain that a model is.

        Raises:
            ModeconnError: the model is no chain; the text says where and why.
        """
        return ChainStructure(LayerChain.of(model, sample))

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return self.chain.name

    @property
    def classes(self) -> int:
        """The number of outputs."""
        return self.chain.classes

    def rows(self, sample: Tensor) -> int:
        """Returns the rows of input whose widest value fits a plain pass's memory."""
        return block_rows(self.chain, sample)

    def run(self, state: State, x: Tensor) -> Tensor:
        """Returns the outputs [N, classes] of a plain pass, dead units included."""
        return self.chain.run(state, x)

    def classify(self, start: State, stop: State) -> Evidence:
        """Classifies the segment between two states; see `classify_segment`."""
        return classify_segment(self.chain, start, stop)

    def largest(self, start: State, stop: State, inputs: Tensor) -> tuple[float, str]:
        """Bounds every value on the segment between two states; see `value_ranges`."""
        return value_ranges.largest(self.chain, start, stop, inputs)

    def rounding(
        self, points: Sequence[State], evidence: Sequence[Evidence], rows: int, budget: float
    ) -> PathRounding | None:
        """Returns the bounds of a path; see `rounding`."""
        return chain_rounding(self.chain, points, evidence, rows, budget)


def structure_of(model: nn.Module, sample: Tensor) -> Structure:
    """Returns the structure of a model: a chain of layers, or any captured graph.

    Args:
        model: any module; it is left as it was.
        sample: a few rows of input.

    Raises:
        ModeconnError: its outputs have no certificate; the text says why.
    """
    try:
        return ChainStructure.of(model, sample)
    except ModeconnError:
        return CapturedStructure.of(model, sample)
