"""Subnetworks of a residual network: the blocks behind an entry, on one half of all channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn.connection.residual.entries import EntryValue, Halves
from modeconn.connection.residual.network import ConvNorm, ResidualNetwork

State = Mapping[str, Tensor]


class HalfConvNorm(nn.Module):
    """A convolution and its norm between some input and some output channels.

    Args:
        piece: of the network.
        rows, columns: channels of its value and of its input.
        state: the network's own weights, which it begins with.
    """

    def __init__(self, piece: ConvNorm, rows: Tensor, columns: Tensor, state: State) -> None:
        super().__init__()
        self.piece, self.rows, self.columns = piece, rows, columns
        weight = state[piece.weight]
        self.weight = nn.Parameter(weight[rows][:, columns].clone())
        self.bias = None
        if piece.bias is not None:
            self.bias = nn.Parameter(state[piece.bias][rows].clone())
        norm = piece.norm
        self.norm = nn.BatchNorm2d(len(rows), norm.eps, affine=norm.weight is not None).to(weight)
        with torch.no_grad():
            for name, key in self.norm_keys():
                getattr(self.norm, name).copy_(state[key][rows])

    def norm_keys(self) -> Iterator[tuple[str, str]]:
        """Pairs the norm's own names with the network's keys."""
        norm = self.piece.norm
        names = {"weight": norm.weight, "bias": norm.bias}
        names |= {"running_mean": norm.mean, "running_var": norm.var}
        for name, key in names.items():
            if key is not None:
                yield name, key

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, rows, …] of [N, columns, …]."""
        value: Tensor = self.norm(self.piece.convolve(x, self.weight, self.bias))
        return value

    def incoming(self) -> dict[str, Tensor]:
        """Returns the rows of the network's tensors by key, zero in all other columns."""
        like = self.weight.detach()
        rows = like.new_zeros(len(self.rows), self.piece.inputs, *like.shape[2:])
        rows[:, self.columns] = like
        found = {self.piece.weight: rows}
        if self.bias is not None and self.piece.bias is not None:
            found[self.piece.bias] = self.bias.detach()
        return found | {key: getattr(self.norm, name).detach() for name, key in self.norm_keys()}


def zero_rows(piece: ConvNorm, rows: Tensor, state: State) -> dict[str, Tensor]:
    """Returns rows that make channels zero: a convolution of zeros, and a norm that keeps 0."""
    values = {piece.weight: 0.0, piece.norm.weight: 1.0, piece.norm.bias: 0.0}
    values |= {piece.bias: 0.0, piece.norm.mean: 0.0, piece.norm.var: 1.0}
    return {
        key: torch.full_like(state[key][rows], value)
        for key, value in values.items()
        if key is not None
    }


class HalfBlock(nn.Module):
    """Block k on one side: its branch from some convolution on, or none, and its shortcut.

    Args:
        first: the first convolution of the branch that it has; one more than there are for a branch
            of zeros.
    """

    def __init__(
        self, network: ResidualNetwork, k: int, side: int, first: int, state: State
    ) -> None:
        super().__init__()
        block, halves = network.blocks[k - 1], Halves(network)
        before, after = halves.of_stream(k - 1, side), halves.of_stream(k, side)
        pieces = []
        for i in range(first, len(block.branch)):
            columns = halves.of_branch(k, i - 1, side) if i else before
            rows = halves.of_branch(k, i, side)
            pieces.append(HalfConvNorm(block.branch[i], rows, columns, state))
        self.k, self.first, self.block, self.rows = k, first, block, after
        self.branch = nn.ModuleList(pieces)
        shortcut = block.shortcut
        self.shortcut = None if shortcut is None else HalfConvNorm(shortcut, after, before, state)

    def forward(self, v: Tensor, u: Tensor | None = None) -> Tensor:
        """Returns v_k of v_{k-1}, and of the value between convolutions where the branch begins."""
        short = v if self.shortcut is None else self.shortcut(v)
        value = v if u is None else u
        for i, piece in enumerate(self.branch):
            value = piece(value)
            if i < len(self.branch) - 1:
                value = F.relu(value)
        return F.relu(value + short if len(self.branch) else short)

    def pieces(self) -> Iterator[HalfConvNorm]:
        """Lists its convolutions."""
        for piece in self.branch:
            assert isinstance(piece, HalfConvNorm)
            yield piece
        if self.shortcut is not None:
            yield self.shortcut

    def incoming(self, state: State) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Lists the channels that it writes, each with the rows of the network's tensors."""
        for piece in self.pieces():
            yield piece.rows, piece.incoming()
        if not len(self.branch):
            yield self.rows, zero_rows(self.block.branch[-1], self.rows, state)


class ResidualSubnetwork(nn.Module):
    """S of an entry: from one half of the entry's value to the outputs.

    Args:
        network: the architecture.
        entry: where it begins, and its side.
        state: the network's own weights, which it begins with.
    """

    def __init__(self, network: ResidualNetwork, entry: EntryValue, state: State) -> None:
        super().__init__()
        self.network, self.entry = network, entry
        halves, side = Halves(network), entry.side
        self.stem: HalfConvNorm | None = None
        if entry.block < 0:
            every = torch.arange(network.stem.inputs)
            self.stem = HalfConvNorm(network.stem, halves.of_stream(0, side), every, state)
        blocks = []
        for k in range(entry.first_block, network.length + 1):
            first = 0
            if k == entry.first_block:
                first = entry.inner or len(network.blocks[k - 1].branch) * entry.zero
            blocks.append(HalfBlock(network, k, side, first, state))
        self.blocks = nn.ModuleList(blocks)
        self.columns = halves.of_stream(network.length, side)
        self.weight = nn.Parameter(state[network.weight][:, self.columns].clone())
        self.bias = None
        if network.bias is not None:
            self.bias = nn.Parameter(state[network.bias].clone())

    def forward(self, v: Tensor, u: Tensor | None = None) -> Tensor:
        """Returns logits [N, classes].

        Args:
            v: the entry's half of the stream, or the network's input.
            u: its half of the inner value, where the entry is one.
        """
        if self.stem is not None:
            v = self.network.stemmed(self.stem(v))
        for number, block in enumerate(self.blocks):
            v = block(v, u if number == 0 else None)
        return F.linear(self.network.pooled(v), self.weight, self.bias)

    def half_blocks(self) -> list[HalfBlock]:
        """Lists its blocks."""
        return [block for block in self.blocks if isinstance(block, HalfBlock)]

    def pieces(self) -> Iterator[HalfConvNorm]:
        """Lists its convolutions."""
        if self.stem is not None:
            yield self.stem
        for block in self.half_blocks():
            yield from block.pieces()

    @torch.no_grad()
    def take_over(self, other: ResidualSubnetwork) -> None:
        """Takes over what another subnetwork on the same side has in common with it."""
        own = {block.k: block for block in self.half_blocks()}
        for block in other.half_blocks():
            if block.k in own and own[block.k].first == block.first:
                own[block.k].load_state_dict(block.state_dict())
        self.weight.copy_(other.weight)
        if self.bias is not None and other.bias is not None:
            self.bias.copy_(other.bias)

    def incoming(self, state: State) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Lists the channels that it writes, each with the rows of the network's tensors."""
        if self.stem is not None:
            yield self.stem.rows, self.stem.incoming()
        for block in self.half_blocks():
            yield from block.incoming(state)
