"""Computes the halves of values that subnetworks read, group by group so that they fit the memory.

Values of images are large: those that all entries of a ResNet-20 of width 16 read of 20,000 images
take 3 GB in half precision. So the entries are taken in groups, from the top down, and each group's
values come from one pass through the network, up to the highest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modeconn.capture.graph import Graph, Size
from modeconn.capture.mixing import run, values_of
from modeconn.connection.residual.entries import EntryValue
from modeconn.connection.residual.network import ResidualNetwork
from modeconn.data.batches import as_batches

State = Mapping[str, Tensor]
# A node, and the side whose channels are taken.
HalfValue = tuple[int, int]

# Bytes of the values of a group: with a network's weights, the data and what training takes, well
# below the memory of a small machine.
_GROUP_BUDGET = 1 << 30
# Rows of a pass: large enough to keep vector units busy, small enough for the caches.
_ROWS = 250
# Half precision holds numbers up to 65,504: values whose first rows stay below this have room.
_HALF_BELOW = 1e3
_BYTES_OF_HALF = 2


def values_read(network: ResidualNetwork, entry: EntryValue) -> list[HalfValue]:
    """Returns the values that a subnetwork reads: the stream, and the inner value if it has one."""
    if not entry.inner:
        return [(network.stream(entry.block), entry.side)]
    block = network.blocks[entry.block - 1]
    return [
        (network.stream(entry.block - 1), entry.side),
        (block.inner[entry.inner - 1], entry.side),
    ]


def grouped(
    network: ResidualNetwork, entries: Sequence[EntryValue], rows: int, budget: int = _GROUP_BUDGET
) -> Iterator[list[EntryValue]]:
    """Splits entries, in their order, into groups whose values fit a budget of bytes together."""
    group: list[EntryValue] = []
    held: set[HalfValue] = set()
    for entry in entries:
        more = held.union(values_read(network, entry))
        if group and rows * sum(_size(network.graph, node) for node, _ in more) > budget:
            yield group
            group, more = [], set(values_read(network, entry))
        group.append(entry)
        held = more
    if group:
        yield group


def _size(graph: Graph, node: int) -> int:
    """Returns the bytes of half a value's channels, of one row."""
    numbers = 1
    for size in graph.nodes[node].shape[1:]:
        numbers *= size.of(1) if isinstance(size, Size) else size
    return numbers * _BYTES_OF_HALF // 2


def half_values(
    network: ResidualNetwork,
    state: State,
    data: Any,
    wanted: Sequence[HalfValue],
    check: Callable[[], None],
) -> dict[HalfValue, Tensor]:
    """Passes the data through a network once, up to the highest value that is wanted.

    Args:
        state: the network's weights, float32.
        data: as for `evaluate`.
        check: called now and then: it may raise, to end the pass.

    Returns:
        [N, channels / 2, …] in half precision, or float32 where values are large.
    """
    nodes = {node for node, _ in wanted}
    parts: dict[HalfValue, list[Tensor]] = {key: [] for key in wanted}
    like = state[network.weight]
    with torch.no_grad():
        for x, _ in as_batches(data, _ROWS):
            check()
            found = values_of(network.graph, state, _as_read(x, like), nodes)
            for (node, side), chunks in parts.items():
                value = found[node]
                half = value[:, _half_of(value, side)]
                if not chunks:
                    small = float(half.abs().max()) < _HALF_BELOW
                    chunks.append(half.half() if small else half.clone())
                else:
                    chunks.append(half.to(chunks[0].dtype))
    # One after another, so that no more than one is there twice.
    return {key: torch.cat(parts.pop(key)) for key in list(parts)}


def output_of(graph: Graph, state: State, x: Tensor) -> Tensor:
    """Computes a network's outputs [N, classes]."""
    outputs: Tensor = run(graph, dict(state), x.contiguous(memory_format=torch.channels_last))
    return outputs


def _as_read(x: Tensor, like: Tensor) -> Tensor:
    """Returns inputs in the dtype and on the device of the weights, channels last."""
    return x.to(like).contiguous(memory_format=torch.channels_last)


def _half_of(value: Tensor, side: int) -> slice:
    """Returns the channels of a side, which `Halves` gives: the first half, or the second."""
    middle = value.shape[1] // 2
    return slice(middle, None) if side else slice(middle)
