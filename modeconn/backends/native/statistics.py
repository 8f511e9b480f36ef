"""Statistics of a batch for every norm of a network in training mode, at all points of a path.

`training_mode.training_graph` makes the graph whose output they are. The C++ engine runs a segment
of which it has all steps; any other runs as the reference backend runs any graph.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.base import Values, attempt
from modeconn.backends.native import extension as native
from modeconn.backends.native.backend import given_values
from modeconn.backends.native.builder import Builder
from modeconn.backends.native.layers import Layer
from modeconn.backends.native.lowering import batch_norm, begin_with_layer
from modeconn.backends.node_reading import unsupported
from modeconn.backends.reference import ReferenceBackend
from modeconn.errors import Unsupported
from modeconn.parameters.blending import blend
from modeconn.plan.program import Combination, Form, Program, Segment, Varying, VaryingStep
from modeconn.plan.units import static

# Activations that never fall: the maximum of their values is the value of the maximum.
_RISING = ("identity", "relu", "leaky_relu")


class BatchStatistics(ReferenceBackend):
    """Statistics in plain PyTorch, point by point."""

    def statistics(self, segment: Segment, values: Values, rows: int) -> list[tuple[Tensor, ...]]:
        """For each norm mean and unbiased variance of a batch at each point, [T, channels] each.

        Args:
            values: what `shared` returned for the batch.

        Raises:
            ValueError: a norm that gets a single value per channel.
        """
        found = []
        for point in range(len(segment.point_indices)):
            ((_, pairs),) = self.outputs(segment, point, values, rows)
            found.append(pairs)
        of_norms = zip(*found)
        return [tuple(map(torch.stack, zip(*of_points))) for of_points in of_norms]


class NativeStatistics(BatchStatistics):
    """Statistics in the engine, for all points of a segment at once, where it has every step."""

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device) -> None:
        self._built: dict[int, TrainingBuilder] = {}
        kept: set[int] = set()
        for segment in program.segments:
            built = attempt(functools.partial(TrainingBuilder, program, segment))
            if not isinstance(built, Unsupported) and built.norms:
                self._built[segment.index] = built
                kept |= built.steps.shared()
        super().__init__(program, dtype, device, kept=kept)
        self._dtype = dtype
        self.name = "native" if self._built else "reference"

    def statistics(self, segment: Segment, values: Values, rows: int) -> list[tuple[Tensor, ...]]:
        built = self._built.get(segment.index)
        if built is None:
            return super().statistics(segment, values, rows)
        points, steps = slice(0, len(segment.point_indices)), built.steps
        given = given_values(values, self._dtype)
        terms, columns = given(steps.terms, None)
        table = native.extension().chain_statistics(
            terms,
            columns,
            [layer.at(points, given) for layer in steps.layers],
            activation=steps.activation.name,
            slope=steps.activation.slope,
            threads=torch.get_num_threads(),
            **native.switches(),
        )
        of_norm = built.split(torch.from_numpy(table))
        pairs = []
        for pair in self.program.graph.output:
            forms = [segment.outputs[leaf.index] for leaf in pair]
            varying = [form for form in forms if isinstance(form, Varying)]
            if varying:
                pairs.append(of_norm[segment.steps[varying[0].step].inputs[0]])
            else:
                pairs.append(tuple(_combined(form, values, points.stop) for form in forms))
        return pairs


class TrainingBuilder(Builder):
    """A segment as the engine takes it, with its norms as steps of their own.

    Attributes:
        norms: the layer of each norm, by the step.

    Raises:
        Unsupported: the engine does not have some step.
    """

    def __init__(self, program: Program, segment: Segment) -> None:
        super().__init__(program, segment)
        self.norms: dict[int, Layer] = {}
        # of the norms whose input is given with the other sign
        self._signs: dict[int, np.ndarray] = {}
        for index in range(len(segment.steps)):
            self.add(index)
        self._pool_first()

    def add(self, index: int) -> None:
        """Adds a step, a norm with the statistics of the batch among them."""
        step = self.segment.steps[index]
        norm = step.inputs[0] if step.inputs else None
        if step.node.op == "batch_norm_training":
            self._add_training_norm(index, step)
        elif step.node.op == "getitem" and isinstance(norm, int) and norm in self.norms:
            if step.node["index"] == 0:  # the value, and not its statistics
                self._put(index, self._place[norm])
        else:
            super().add(index)

    def split(self, table: Tensor) -> dict[object, tuple[Tensor, ...]]:
        """Means and variances [T, channels] by the norms' steps.

        Args:
            table: what the engine returned, [T, 2, channels of all norms].
        """
        rows = {step for step in self.norms if len(self.segment.steps[step].node.shape) == 2}
        # The engine's order: norms of images first.
        steps = sorted(self.norms, key=lambda step: (step in rows, self._place[step]))
        sizes = [static(self.segment.steps[step].node.shape[1]) for step in steps]
        parts = table.split(sizes, dim=2)
        found: dict[object, tuple[Tensor, ...]] = {
            step: part.unbind(1) for step, part in zip(steps, parts)
        }
        for step, signs in self._signs.items():
            mean, variance = found[step]
            found[step] = mean * torch.from_numpy(signs), variance
        return found

    def _add_training_norm(self, index: int, step: VaryingStep) -> None:
        if len(step.node.shape) not in (2, 4) or not self._fits(step.node):
            raise unsupported(step.node, "batch norms of images [N, C, H, W] or rows [N, C]")
        place, alone = self._read_alone(step.inputs[0])
        if place < 0 and alone and begin_with_layer(self.program, self.steps):
            place = 0
        self.norms[index] = batch_norm(step, len(self.segment.point_indices), place)
        self._put(index, self._append(self.norms[index]))

    def _pool_first(self) -> None:
        """Moves a maximum that follows a norm before it: only what is left waits for statistics.

        Where the norm's scale is positive, the greatest of its values comes from its greatest
        input. Where it is negative, the layer before gives its values with the other sign.
        """
        layers = self.steps.layers
        for step, norm in self.norms.items():
            at, behind = self._place[step], self._readers(self._place[step])
            if len(behind) != 1 or layers[behind[0]].op != "max_pool2d" or norm.adds is not None:
                continue
            rises = norm.activation.name in _RISING and norm.activation.slope >= 0
            if rises and self._scales_up(step, norm):
                pool, place = layers[behind[0]], behind[0]
                layers[at], layers[place] = pool, norm
                pool.reads, norm.reads, self._place[step] = norm.reads, at, place

    def _scales_up(self, step: int, norm: Layer) -> bool:
        """Whether a norm's scale is positive, or was made so by the signs of the layer before."""
        assert norm.norm is not None and norm.reads is not None
        scale, shift = norm.norm
        signs = np.where(scale < 0, -1.0, 1.0)
        if (signs > 0).all():
            return True
        before = self.steps.layers[norm.reads] if norm.reads >= 0 else Layer()
        free = before.weighted and before.bare and before.norm is None
        if not free or len(self._readers(norm.reads)) > 1:
            return False
        before.norm, norm.norm = (signs, np.zeros_like(signs)), (scale * signs, shift)
        self._signs[step] = signs
        return True

    def _readers(self, place: int) -> list[int]:
        """The layers that read a layer's value."""
        return [
            i
            for i, layer in enumerate(self.steps.layers)
            if place in (layer.reads, layer.adds, *layer.inputs)
        ]


def make_statistics(
    backend: str, program: Program, dtype: torch.dtype, device: torch.device
) -> BatchStatistics:
    """The engine for the backends "auto" and "native" where it is available, else plain PyTorch."""
    in_engine = backend in ("auto", "native") and device.type == "cpu" and native.available()
    return (NativeStatistics if in_engine else BatchStatistics)(program, dtype, device)


def _combined(form: Form, values: Values, points: int) -> Tensor:
    """Statistics that are a combination of shared ones, at every point."""
    assert isinstance(form, Combination)
    terms = [values[term.value] for term in form.terms]
    rows = np.stack([term.coefficients for term in form.terms], axis=1)
    return torch.stack([blend(terms, row) for row in rows[:points]])
