"""The numbers that a network draws in eval mode, the same at every point of a path.

A masked autoencoder hides other patches in each call, and a dropout that is always on drops other
units: at 101 points that is 101 different noises, and a curve of their differences. With a seed,
each operation that draws does so from a state that follows from the seed, its place in the network
and the rows alone, so that points differ by their weights and by nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from modeconn.capture.graph import Graph, Node
from modeconn.capture.opaque import Opaque


@dataclass
class Noise:
    """A seed for what a network draws.

    Attributes:
        seed: of all draws; None to draw from PyTorch's own state, anew at each point.
        row: the first row of the batch that is computed, among all of the data.
    """

    seed: int | None = None
    row: int = 0

    def of(
        self, graph: Graph, node: Node, start: int, device: torch.device
    ) -> AbstractContextManager[None]:
        """Within, a node draws for the rows from `start` on of the batch what it always draws."""
        if self.seed is None or not draws(graph, node):
            return nullcontext()
        text = f"{self.seed} {node.id} {self.row + start}"
        digest = hashlib.sha256(text.encode()).digest()
        return seeded(int.from_bytes(digest[:7], "big"), device)


def draws(graph: Graph, node: Node) -> bool:
    """Whether a node draws random numbers, or is a part that runs as it is and may."""
    return node.random or (graph.random and isinstance(node.function, Opaque))


def is_random(graph: Graph) -> bool:
    """Whether a network draws random numbers."""
    return graph.random or any(node.random for node in graph.nodes)


@contextmanager
def undrawn(device: torch.device) -> Iterator[list[torch.Generator]]:
    """Within, PyTorch's generators, CPU and device, are used; after it, they are as before."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [generator.get_state() for generator in generators]
    try:
        yield generators
    finally:
        for generator, state in zip(generators, before):
            generator.set_state(state)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within, PyTorch's generators on the CPU and a device begin at a seed; after it, as before."""
    with undrawn(device) as generators:
        for generator in generators:
            generator.manual_seed(seed)
        yield
