"""The statistics of a batch for every norm of a network in training mode, at all points of a path.

`statistics.training_graph` makes the graph whose output they are. The C++ engine runs it where all
of it is a chain of the engine's steps; anything else is run as the reference backend runs any
graph.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.native import extension as native
from modeconn.backends.native.backend import given_values
from modeconn.backends.native.layers import Layer
from modeconn.backends.native.lowering import batch_norm, begin_with_layer
from modeconn.backends.native.partition import Builder
from modeconn.backends.reference import ReferenceBackend, Values
from modeconn.parameters.paths import blend
from modeconn.plan.program import Combination, Form, Program, Segment, Varying, VaryingStep
from modeconn.plan.units import static

# Activations that never fall.
_RISING = ("identity", "relu", "leaky_relu")


class BatchStatistics(ReferenceBackend):
    """Plain PyTorch, point by point."""

    def statistics(self, segment: Segment, values: Values, rows: int) -> list[tuple[Tensor, ...]]:
        """For each norm the mean and the unbiased variance of a batch at each of the segment's points, [T, channels] each.

        Args:
            values: what `shared` returned for the batch.

        Raises:
            ValueError: a norm that gets a single value per channel.
        """
        found = []
        for point in range(len(segment.point_indices)):
            ((_, pairs),) = self.outputs(segment, point, values, rows)
            found.append(pairs)
        return [tuple(torch.stack(value) for value in zip(*of_points)) for of_points in zip(*found)]


class NativeStatistics(BatchStatistics):
    """Segments of which the engine knows every step run in it, for all of their points at once."""

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(program, dtype, device)
        self._dtype = dtype
        self._chains: dict[int, TrainingChain] = {}
        for segment in program.segments:
            found = TrainingChain(program, segment)
            if found.norms and not found.reason:
                self._chains[segment.index] = found
                self._kept |= found.chain.shared()
        self.name = "native" if self._chains else "reference"

    def statistics(self, segment: Segment, values: Values, rows: int) -> list[tuple[Tensor, ...]]:
        found = self._chains.get(segment.index)
        if found is None:
            return super().statistics(segment, values, rows)
        points, chain = slice(0, len(segment.point_indices)), found.chain
        given = given_values(values, self._dtype)
        terms, columns = given(chain.terms, None)
        table = native.extension().chain_statistics(
            terms,
            columns,
            [layer.at(points, given) for layer in chain.layers],
            activation=chain.start.activation,
            slope=chain.start.slope,
            threads=torch.get_num_threads(),
        )
        of_norm = found.split(torch.from_numpy(table))
        pairs = []
        for pair in self.program.graph.output:
            forms = [segment.outputs[leaf.index] for leaf in pair]
            moving = [
                segment.steps[form.step].inputs[0] for form in forms if isinstance(form, Varying)
            ]
            pairs.append(
                of_norm[moving[0]]
                if moving
                else tuple(_combined(form, values, points.stop) for form in forms)
            )
        return pairs


class TrainingChain(Builder):
    """A segment as the engine takes it, with its norms as steps of their own.

    Attributes:
        reason: why the engine cannot take it; "" if it can.
        norms: the layer of each norm, by the step.
    """

    def __init__(self, program: Program, segment: Segment) -> None:
        super().__init__(program, segment, 0)
        self.norms: dict[int, Layer] = {}
        # of the norms whose input was given with the other sign
        self._signs: dict[int, np.ndarray] = {}
        self.reason = next(
            filter(None, (self.add(index) for index in range(len(segment.steps)))), ""
        )
        if not self.reason:
            self._pool_first()

    def add(self, index: int) -> str:
        step = self.segment.steps[index]
        if step.node.op == "batch_norm_training":
            return self._add_norm(index, step)
        norm = step.inputs[0] if step.inputs else None
        if step.node.op == "getitem" and isinstance(norm, int) and norm in self.norms:
            if step.node.args[1] == 0:  # the value, and not its statistics
                self._put(index, self._place[norm])
            return ""
        return super().add(index)

    def split(self, table: Tensor) -> dict[object, tuple[Tensor, ...]]:
        """What the engine returned, [T, 2, channels of all norms], by the norms' steps: means and variances [T, channels]."""
        rows = {step for step in self.norms if len(self.segment.steps[step].node.shape) == 2}
        # the engine's order
        steps = sorted(self.norms, key=lambda step: (step in rows, self._place[step]))
        sizes = [static(self.segment.steps[step].node.shape[1]) for step in steps]
        found: dict[object, tuple[Tensor, ...]] = {
            s: part.unbind(1) for s, part in zip(steps, table.split(sizes, dim=2))
        }
        for step, signs in self._signs.items():
            mean, variance = found[step]
            found[step] = mean * torch.from_numpy(signs), variance
        return found

    def _add_norm(self, index: int, step: VaryingStep) -> str:
        if len(step.node.shape) not in (2, 4) or not self._fits(step.node):
            return "normalises neither rows nor images"
        reason, place, alone = self._read_alone(step.inputs[0])
        if reason:
            return reason
        if place < 0 and alone and begin_with_layer(self.program, self.chain):
            place = 0
        self.norms[index] = batch_norm(step, len(self.segment.point_indices), place)
        self._put(index, self._append(self.norms[index]))
        return ""

    def _pool_first(self) -> None:
        """Take a maximum that follows a norm before it, so that only what is left waits for the statistics.

        Where the norm's scale is positive, the greatest of its values comes from its greatest
        input. Where it is negative, the layer before gives its values with the other sign.
        """
        layers = self.chain.layers
        for step, norm in self.norms.items():
            at, behind = self._place[step], self._readers(self._place[step])
            if len(behind) != 1 or layers[behind[0]].op != "max_pool2d" or norm.adds is not None:
                continue
            if norm.activation in _RISING and norm.slope >= 0 and self._rises(step, norm):
                pool, place = layers[behind[0]], behind[0]
                layers[at], layers[place] = pool, norm
                pool.reads, norm.reads, self._place[step] = norm.reads, at, place

    def _rises(self, step: int, norm: Layer) -> bool:
        """Whether a norm's scale is positive, or was made so."""
        assert norm.norm is not None and norm.reads is not None
        scale, shift = norm.norm
        signs = np.where(scale < 0, -1.0, 1.0)
        if (signs > 0).all():
            return True
        before = self.chain.layers[norm.reads] if norm.reads >= 0 else Layer()
        free = (
            before.coefficients is not None
            and before.norm is None
            and before.adds is None
            and before.activation == "identity"
        )
        if not free or len(self._readers(norm.reads)) > 1:
            return False
        before.norm, norm.norm = (signs, np.zeros_like(signs)), (scale * signs, shift)
        self._signs[step] = signs
        return True

    def _readers(self, place: int) -> list[int]:
        """The layers that take a layer's value."""
        return [
            i
            for i, layer in enumerate(self.chain.layers)
            if place in (layer.reads, layer.adds, *layer.inputs)
        ]


def make_statistics(
    backend: str, program: Program, dtype: torch.dtype, device: torch.device
) -> BatchStatistics:
    """The engine where the backend asked for is "auto" or "native" and it can be had, else plain PyTorch."""
    wanted = backend in ("auto", "native") and device.type == "cpu" and native.available()
    return (NativeStatistics if wanted else BatchStatistics)(program, dtype, device)


def _combined(form: Form, values: Values, points: int) -> Tensor:
    """Statistics that are a combination of shared ones, at every point."""
    assert isinstance(form, Combination)
    terms = [values[term.value] for term in form.terms]
    return torch.stack(
        [blend(terms, [term.coefficients[point] for term in form.terms]) for point in range(points)]
    )
