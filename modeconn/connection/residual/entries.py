"""Lists the subnetworks of a residual network in the order in which a path goes through them.

A subnetwork reads one half of a value, so the other half is free for the next. An identity shortcut
keeps channels of the stream alive from block to block: halves belong to a stage, not to a layer.
The order is from the top, the two halves in turn (../../../docs/connect.md):

    v_K  [u_K …]  v_{K-1}  [u_{K-1} …]  …  v_0  input

After the subnetwork of v_k the whole branch of block k is still alive, for v_k reads it. So that
of v_{k-1} leaves it out, with a branch of zeros, unless subnetworks of the block's inner values
came before, which free half of them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from modeconn.connection.residual.network import ResidualNetwork
from modeconn.errors import ModeconnError


@dataclass(frozen=True)
class EntryValue:
    """The value that a subnetwork reads, and how it goes on from there.

    Attributes:
        block: k of v_k or u_k^j; -1 for the network's input.
        inner: j of u_k^j, from 1; 0 for v_k.
        side: 0 or 1, the half that the subnetwork lives on.
        zero: whether the first block behind it has a branch of zeros.
    """

    block: int
    inner: int
    side: int
    zero: bool

    @property
    def label(self) -> str:
        """Names it, as in "v3", "u3", "u3.2", "input"."""
        if self.block < 0:
            return "input"
        if not self.inner:
            return f"v{self.block}"
        return f"u{self.block}" + (f".{self.inner}" if self.inner > 1 else "")

    @property
    def first_block(self) -> int:
        """The first block that the subnetwork has weights of; K + 1 where it has none."""
        return max(self.block, 0) if self.inner else max(self.block, 0) + 1


def entries_of(network: ResidualNetwork, inner: Collection[int] | None = None) -> list[EntryValue]:
    """Lists the entries of a descent, from the top to the input.

    Args:
        inner: blocks whose inner values have subnetworks of their own. By default the last block,
            and those with a convolution for a shortcut: there a branch of zeros costs most.
    """
    chosen = _default_inner(network) if inner is None else set(inner)
    unknown = sorted(k for k in chosen if not 1 <= k <= network.length)
    if unknown:
        raise ModeconnError(
            f"there is no block {unknown[0]}: expected blocks 1 to {network.length}"
        )
    found = [(network.length, 0, False)]
    for k in range(network.length, 0, -1):
        if k in chosen:
            found += [(k, j, False) for j in range(len(network.blocks[k - 1].inner), 0, -1)]
        found.append((k - 1, 0, k not in chosen))
    # The subnetwork on the input is the stem on that of v_0.
    found.append((-1, 0, found[-1][2]))
    return [EntryValue(k, j, number % 2, zero) for number, (k, j, zero) in enumerate(found)]


def _default_inner(network: ResidualNetwork) -> set[int]:
    blocks = enumerate(network.blocks, 1)
    return {network.length, *(k for k, block in blocks if block.shortcut is not None)}


@dataclass(frozen=True)
class Halves:
    """The channels of every value on both sides: the first half of them, and the second."""

    network: ResidualNetwork

    def of_stream(self, k: int, side: int) -> Tensor:
        """Returns channels of v_k."""
        return _half(self.network.channels(k), side)

    def of_branch(self, k: int, i: int, side: int) -> Tensor:
        """Returns channels of the value of block k's i-th convolution, from 0."""
        return _half(self.network.blocks[k - 1].branch[i].outputs, side)

    def check(self) -> None:
        """Raises where a value has an odd number of channels, which has no two equal halves."""
        pieces = [self.network.stem]
        for block in self.network.blocks:
            pieces += block.branch
        for piece in pieces:
            if piece.outputs % 2:
                raise ModeconnError(
                    f"{piece.weight} has {piece.outputs} channels: expected an even number, "
                    "one half for each of two subnetworks"
                )


def _half(channels: int, side: int) -> Tensor:
    middle = channels // 2
    return torch.arange(middle, channels) if side else torch.arange(middle)
