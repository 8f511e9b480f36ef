"""The steps of the C++ engine as data: what `csrc/README.md` says of them, for all points of a segment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modeconn.plan.program import Term


@dataclass
class Stage:
    """Something that the engine does to a value, and the activation after it."""

    activation: str = "identity"
    slope: float = 0.01


@dataclass
class Layer(Stage):
    """A step of the engine.

    A linear layer or convolution Σ_g columns[:, g] weights[g], with a bias likewise; a pooling;
    "affine", a scale and shift of each channel; "group_norm"; "batch_norm", by the statistics of
    the batch; "add", the sum of several values; "multiply", the product of two; "concat", their
    channels; "take", some channels; "flatten"; or "terms", values from outside.

    Attributes:
        reads: the layer whose value it takes; -1: the chain's terms; None: the layer before it.
        adds: of a layer with weights, an "affine" or "batch_norm": one whose value is added before
            the activation.
        inputs: of "add", "multiply" and "concat": the layers whose values it takes.
        norm: scale and shift [points, units] of a batch norm that follows, or of an "affine" or a
            norm itself.
        terms, step: of "terms": as a chain has them.
    """

    op: str = "linear"
    geometry: dict[str, Any] = field(default_factory=dict)
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
    def activates(self) -> bool:
        """Whether the engine applies an activation behind it."""
        return self.sums or self.op in ("add", "concat", "group_norm", "multiply", "take", "terms")

    @property
    def sums(self) -> bool:
        """Whether the engine can add another value to it."""
        return self.coefficients is not None or self.op in ("affine", "batch_norm")

    def at(self, points: slice, given: Given) -> dict[str, Any]:
        """The step as the engine takes it, for some of the points."""
        step: dict[str, Any] = {"op": self.op, **self.geometry}
        if self.activates:
            step |= {"activation": self.activation, "slope": self.slope}
        if self.op in ("add", "concat", "multiply"):
            return step | {"inputs": list(self.inputs)}
        if self.op == "terms":
            terms, columns = given(self.terms, self.step)
            return step | {"terms": terms, "coefficients": np.ascontiguousarray(columns[points])}
        step["input"] = self.reads
        if self.sums:
            step["add"] = self.adds
        if self.coefficients is not None:
            step |= {
                "weights": self.weights,
                "coefficients": np.ascontiguousarray(self.coefficients[points]),
            }
        if self.bias_coefficients is not None:
            step |= {
                "biases": self.biases,
                "bias_coefficients": np.ascontiguousarray(self.bias_coefficients[points]),
            }
        if self.norm is not None:
            scale, shift = self.norm
            step |= {
                "scale": np.ascontiguousarray(scale[points]),
                "shift": np.ascontiguousarray(shift[points]),
            }
        return step


# Terms, or an earlier step of the segment, to arrays and their coefficients [points, arrays].
Given = Callable[[tuple[Term, ...], "int | None"], tuple[list[np.ndarray], np.ndarray]]


@dataclass
class Chain:
    """Steps as the engine takes them: the activation of Σ_j c_j V_j, then layers.

    Attributes:
        step: the earlier step of the segment whose value it begins with, instead of terms.
        numel: of the values from outside that it takes, per row.
    """

    terms: tuple[Term, ...]
    start: Stage = field(default_factory=Stage)
    layers: list[Layer] = field(default_factory=list)
    step: int | None = None
    numel: float = 0.0

    @property
    def images(self) -> bool:
        """Whether it goes through convolutions."""
        return any(layer.op == "conv2d" for layer in self.layers)

    @property
    def constant(self) -> bool:
        """Whether every point has the same output, so that there is next to nothing to do."""
        return (
            self.step is None
            and not self.layers
            and all(np.ptp(term.coefficients) == 0 for term in self.terms)
        )

    @property
    def straight(self) -> bool:
        """Whether each layer reads the one before it and nothing else, and no convolution is grouped or dilated."""
        other = ("add", "affine", "concat", "group_norm", "multiply", "take", "terms")
        plain = (
            layer.adds is None
            and layer.op not in other
            and not {"groups", "dilation", "ceil"} & set(layer.geometry)
            for layer in self.layers
        )
        return (
            self.step is None
            and all(plain)
            and all(layer.reads in (None, i - 1) for i, layer in enumerate(self.layers))
        )

    def shared(self) -> set[int]:
        """The shared values that it takes."""
        return {
            term.value
            for terms in (self.terms, *(layer.terms for layer in self.layers))
            for term in terms
        }
