"""Subgraphs of a segment that the C++ engine runs as one.

A subgraph is a run of steps that the engine has, of which only the last one's value is read
outside. Its values are images and rows, in any order of reading: a value may be read twice and
added later, as in residual networks. Where all of a segment's steps are one subgraph, the engine
runs the segment down to the sums of the head; other subgraphs run between the steps that are left
to the reference backend.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from modeconn.backends.base import attempt
from modeconn.backends.native.builder import Builder, Reads
from modeconn.backends.native.layers import StepGraph
from modeconn.capture.ops import mkl_falls_behind
from modeconn.errors import Unsupported
from modeconn.plan.program import Combination, Program, Segment, Varying

# "auto" leaves a subgraph to the reference backend where it does fewer operations per number that
# it reads or gives: bringing them into the engine's layout and back then costs more than is saved.
_WORTH = 64.0
# Without a convolution the bar is higher: PyTorch's products of matrices are as fast as the
# engine's, unless MKL leaves out instructions that the CPU has, and only the values between the
# layers stay nearer.
_WORTH_OF_LINEARS = 2048.0
# Fewer layers with weights, or a smaller share of the segment's arithmetic, do not pay either.
_LAYERS, _SHARE = 2, 0.05
# What may become a layer with weights: a norm brings the layer before it along.
_WEIGHING = frozenset(("linear", "conv2d", "addmm", "batch_norm"))


@dataclass
class Subgraph:
    """Steps first … last of a segment; `steps` ends with the value of the last."""

    first: int
    last: int
    steps: StepGraph

    def pays(self, segment: Segment) -> bool:
        """Whether "auto" takes it: the cost model, of the plan's counts alone."""
        steps = segment.steps[self.first : self.last + 1]
        flops = sum(step.flops for step in steps)
        layers = sum(layer.weighted for layer in self.steps.layers)
        faster = mkl_falls_behind() or any(step.node.op == "conv2d" for step in steps)
        moved = self.steps.numel + steps[-1].numel
        worth = flops >= (_WORTH if faster else _WORTH_OF_LINEARS) * moved
        return layers >= _LAYERS and worth and flops >= _SHARE * segment.flops

    def pays_alone(self, segment: Segment) -> bool:
        """Whether its convolutions take longer in PyTorch than bringing its values here and back.

        That is so in float64, which PyTorch unfolds images for.
        """
        steps = segment.steps[self.first : self.last + 1]
        flops = sum(step.flops for step in steps)
        return self.steps.images and flops >= _WORTH * (self.steps.numel + steps[-1].numel)


def whole_subgraph(program: Program, segment: Segment, backend: str = "native") -> Subgraph:
    """All steps of a segment as one subgraph that ends in [N, classes].

    Args:
        backend: whose kernels are to run it, as for `Builder`.

    Raises:
        Unsupported: they cannot run as one.
    """
    output = program.graph.tensor_output
    if output is None:
        raise Unsupported("the network returns more than one tensor: the engine runs those of one")
    shape = program.graph.nodes[output].shape
    if len(shape) != 2:
        sizes = ", ".join(map(str, shape))
        raise Unsupported(f"the network's output is [{sizes}]: the engine sums [N, classes]")
    if str(shape[0]) != "N":
        raise Unsupported(f"the network's output has {shape[0]} rows: the engine sums one a sample")
    form = segment.outputs[output]
    if isinstance(form, Combination):
        return Subgraph(0, -1, StepGraph(form.terms))
    builder = Builder(program, segment, 0, backend)
    for index in range(len(segment.steps)):
        builder.add(index)
    last = len(segment.steps) - 1
    if not isinstance(form, Varying) or not builder.ends(last):
        raise Unsupported("the network's output is not the last step: the engine returns the last")
    return Subgraph(0, last, builder.steps)


def straight_steps(program: Program, segment: Segment, backend: str) -> StepGraph:
    """A segment as a chain of layers, each of which reads the one before it and nothing else.

    Raises:
        Unsupported: it is no such chain.
    """
    steps = whole_subgraph(program, segment, backend).steps
    if not steps.straight:
        raise Unsupported("some step does not follow the step before it: the engine runs chains")
    return steps


def subgraphs(program: Program, segment: Segment) -> list[Subgraph]:
    """The longest subgraphs of a segment, each with a layer that has weights, in order."""
    found: list[Subgraph] = []
    reads, start = Reads(segment), 0
    while start < len(segment.steps):
        longest, stop = _longest(program, segment, start, reads)
        if longest is not None:
            found.append(longest)
            start = longest.last + 1
        elif _is_barren(program, segment, start, stop, reads):
            start = stop + 1
        else:
            start += 1
    return found


def _longest(
    program: Program, segment: Segment, start: int, reads: Reads
) -> tuple[Subgraph | None, int]:
    """The longest subgraph from a step on, and the first step that the engine does not take."""
    builder, last, stop = Builder(program, segment, start, reads=reads), -1, len(segment.steps)
    weighted, looked_at = False, 0
    for index in range(start, len(segment.steps)):
        if isinstance(attempt(functools.partial(builder.add, index)), Unsupported):
            stop = index
            break
        if builder.never_ends:
            stop = index + 1
            break
        layers = builder.steps.layers
        weighted = weighted or any(layer.weighted for layer in layers[looked_at:])
        looked_at = len(layers)
        if weighted and builder.ends(index):
            last = index
    if last < 0:
        return None, stop
    if last < stop - 1 or stop < len(segment.steps):  # it has more by now than it should
        builder = Builder(program, segment, start, reads=reads)
        for index in range(start, last + 1):
            builder.add(index)
    return Subgraph(start, last, builder.steps), stop


def _is_barren(program: Program, segment: Segment, start: int, stop: int, reads: Reads) -> bool:
    """Whether no subgraph begins between two steps: no weights there, and none goes beyond."""
    if any(step.node.op in _WEIGHING for step in segment.steps[start:stop]):
        return False
    if stop == len(segment.steps):
        return True
    alone = Builder(program, segment, stop, reads=reads)
    return isinstance(attempt(functools.partial(alone.add, stop)), Unsupported)
