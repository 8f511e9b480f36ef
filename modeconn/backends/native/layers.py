"""Steps of the C++ engine as data, for all points of a segment; csrc/README.md describes each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeconn.backends.activations import IDENTITY, Activation
from modeconn.plan.program import Term

# Shared values as terms, or an earlier step of the segment, to arrays and their coefficients
# [points, arrays].
Given = Callable[[tuple[Term, ...], "int | None"], tuple[list[np.ndarray], np.ndarray]]

_OF_SEVERAL = ("add", "concat", "multiply")


@dataclass
class Layer:
    """A step of the engine, and the activation after it.

    A linear layer or convolution Σ_g coefficients[:, g] weights[g], with a bias likewise; a
    pooling; "affine", a scale and shift of each channel; "group_norm"; "batch_norm", by the
    statistics of the batch; "add", the sum of several values; "multiply", the product of two;
    "concat", their channels; "take", some channels; "flatten"; or "terms", values from outside.

    Attributes:
        geometry: the engine's further arguments: stride, padding, groups, and the like.
        reads: the layer whose value it takes; -1: the graph's terms; None: the layer before it.
        adds: of a layer with weights, an "affine" or "batch_norm": one whose value is added before
            the activation.
        inputs: of "add", "multiply" and "concat": the layers whose values it takes.
        norm: scale and shift [points, units] of a batch norm that follows, or of an "affine" or a
            norm itself.
        terms, step: of "terms": as a `StepGraph` has them.
    """

    op: str = "linear"
    geometry: dict[str, Any] = field(default_factory=dict)
    activation: Activation = IDENTITY
    weights: list[np.ndarray] = field(default_factory=list)
    coefficients: np.ndarray | None = None
    biases: list[np.ndarray] = field(default_factory=list)
    bias_coefficients: np.ndarray | None = None
    norm: tuple[np.ndarray, np.ndarray] | None = None
    reads: int | None = None
    adds: int | None = None
    inputs: tuple[int, ...] = ()
    terms: tuple[Term, ...] = ()
    step: int | None = None

    @property
    def weighted(self) -> bool:
        """Whether it is a linear layer or convolution."""
        return self.coefficients is not None

    @property
    def activates(self) -> bool:
        """Whether the engine applies an activation behind it."""
        others = (*_OF_SEVERAL, "group_norm", "take", "terms")
        return self.sums or self.op in others

    @property
    def sums(self) -> bool:
        """Whether the engine can add another value to it."""
        return self.weighted or self.op in ("affine", "batch_norm")

    @property
    def bare(self) -> bool:
        """Whether neither an activation nor another value has been added to it."""
        return self.activation == IDENTITY and self.adds is None

    def at(self, points: slice, given: Given) -> dict[str, Any]:
        """The step as the engine takes it, for some of the points."""
        step: dict[str, Any] = {"op": self.op, **self.geometry}
        if self.activates:
            step |= {"activation": self.activation.name, "slope": self.activation.slope}
        if self.op in _OF_SEVERAL:
            return step | {"inputs": list(self.inputs)}
        if self.op == "terms":
            terms, columns = given(self.terms, self.step)
            return step | {"terms": terms, "coefficients": np.ascontiguousarray(columns[points])}
        step["input"] = self.reads
        if self.sums:
            step["add"] = self.adds
        if self.coefficients is not None:
            step["weights"] = self.weights
            step["coefficients"] = np.ascontiguousarray(self.coefficients[points])
        if self.bias_coefficients is not None:
            step["biases"] = self.biases
            step["bias_coefficients"] = np.ascontiguousarray(self.bias_coefficients[points])
        if self.norm is not None:
            scale, shift = self.norm
            step["scale"] = np.ascontiguousarray(scale[points])
            step["shift"] = np.ascontiguousarray(shift[points])
        return step


@dataclass
class StepGraph:
    """A network as the engine takes it: activation(Σ_j c_j V_j), then layers.

    Attributes:
        terms: the shared values V_j and their coefficients.
        activation: of the terms.
        step: the earlier step of the segment whose value it begins with, instead of terms.
        numel: of the values from outside that it reads, per row.
        features_last: whether values of four axes are no images [N, C, H, W], but rows of features.
    """

    terms: tuple[Term, ...] = ()
    activation: Activation = IDENTITY
    layers: list[Layer] = field(default_factory=list)
    step: int | None = None
    numel: float = 0.0
    features_last: bool = False

    @property
    def images(self) -> bool:
        """Whether it goes through convolutions."""
        return any(layer.op == "conv2d" for layer in self.layers)

    @property
    def constant(self) -> bool:
        """Whether every point has the same output, so that there is next to nothing to do."""
        moves = any(np.ptp(term.coefficients) != 0 for term in self.terms)
        return self.step is None and not self.layers and not moves

    @property
    def straight(self) -> bool:
        """Whether it is a chain of linear layers, plain convolutions and poolings.

        Each layer reads the one before it and nothing else; no convolution is grouped or dilated.
        """
        if self.step is not None:
            return False
        for place, layer in enumerate(self.layers):
            follows = layer.reads in (None, place - 1) and layer.adds is None
            other = layer.activates and not layer.weighted
            if not follows or other or {"groups", "dilation", "ceil"} & set(layer.geometry):
                return False
        return True

    def shared(self) -> set[int]:
        """The shared values that it reads."""
        found = {term.value for term in self.terms}
        for layer in self.layers:
            found.update(term.value for term in layer.terms)
        return found
