"""How operations look to the C++ engine: its steps, as data, and their translation from the graph's nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.graph import Node
from modeconn.ops import Take
from modeconn.plan.program import Moving, Program, Term, VaryingStep
from modeconn.plan.units import static

# So many multiply-adds for a value take no longer than reading a term of it that is combined.
_DEPTH_PER_TERM = 16
_PASS_THROUGH = ("clone", "alias", "detach", "dropout", "contiguous")


@dataclass
class Stage:
    """Something that the engine does to a value, and the activation after it."""

    activation: str = "identity"
    slope: float = 0.01


@dataclass
class Layer(Stage):
    """A step of the engine.

    A linear layer or convolution Σ_g columns[:, g] weights[g], with a bias likewise; a pooling; "affine", a scale and shift
    of each channel; "batch_norm", by the statistics of the batch; "add", the sum of several values; "concat", their channels;
    "take", some channels; "flatten"; or "terms", values from outside.

    Attributes:
        reads: the layer whose value it takes; -1: the chain's terms; None: the layer before it.
        adds: of a layer with weights, an "affine" or "batch_norm": one whose value is added before the activation.
        inputs: of "add" and "concat": the layers whose values it takes.
        norm: scale and shift [points, units] of a batch norm that follows, or of an "affine" or "batch_norm" itself.
        terms, step: of "terms": as a chain has them.
    """

    op: str = "linear"
    geometry: dict[str, Any] = field(default_factory=dict)
    weights: list[np.ndarray] = field(default_factory=list)
    columns: np.ndarray | None = None
    biases: list[np.ndarray] = field(default_factory=list)
    bias_columns: np.ndarray | None = None
    norm: tuple[np.ndarray, np.ndarray] | None = None
    reads: int | None = None
    adds: int | None = None
    inputs: tuple[int, ...] = ()
    terms: tuple[Term, ...] = ()
    step: int | None = None

    @property
    def activates(self) -> bool:
        """Whether the engine applies an activation behind it."""
        return self.sums or self.op in ("add", "concat", "take", "terms")

    @property
    def sums(self) -> bool:
        """Whether the engine can add another value to it."""
        return self.columns is not None or self.op in ("affine", "batch_norm")

    def at(self, points: slice, given: Given) -> dict[str, Any]:
        """The step as the engine takes it, for some of the points."""
        step: dict[str, Any] = {"op": self.op, **self.geometry}
        if self.activates:
            step |= {"activation": self.activation, "slope": self.slope}
        if self.op in ("add", "concat"):
            return step | {"inputs": list(self.inputs)}
        if self.op == "terms":
            terms, columns = given(self.terms, self.step)
            return step | {"terms": terms, "coefficients": np.ascontiguousarray(columns[points])}
        step["input"] = self.reads
        if self.sums:
            step["add"] = self.adds
        if self.columns is not None:
            step |= {"weights": self.weights, "coefficients": np.ascontiguousarray(self.columns[points])}
        if self.bias_columns is not None:
            step |= {"biases": self.biases, "bias_coefficients": np.ascontiguousarray(self.bias_columns[points])}
        if self.norm is not None:
            scale, shift = self.norm
            step |= {"scale": np.ascontiguousarray(scale[points]), "shift": np.ascontiguousarray(shift[points])}
        return step


# Terms, or an earlier step of the segment, to arrays and their coefficients [points, arrays].
Given = Callable[[tuple[Term, ...], "int | None"], tuple[list[np.ndarray], np.ndarray]]


@dataclass
class Chain:
    """Steps as the engine takes them: the activation of Σ_j column_j V_j, then layers.

    Attributes:
        step: the earlier step of the segment whose value it begins with, instead of terms.
        numbers: of the values from outside that it takes, per row.
    """

    terms: tuple[Term, ...]
    start: Stage = field(default_factory=Stage)
    layers: list[Layer] = field(default_factory=list)
    step: int | None = None
    numbers: float = 0.0

    @property
    def constant(self) -> bool:
        """Whether every point has the same output, so that there is next to nothing to do."""
        return self.step is None and not self.layers and all(np.ptp(term.column) == 0 for term in self.terms)

    @property
    def straight(self) -> bool:
        """Whether each layer reads the one before it and nothing else, and no convolution is grouped or dilated."""
        other = ("add", "affine", "concat", "take", "terms")
        plain = (
            layer.adds is None and layer.op not in other and not {"groups", "dilation"} & set(layer.geometry)
            for layer in self.layers
        )
        return self.step is None and all(plain) and all(layer.reads in (None, i - 1) for i, layer in enumerate(self.layers))

    def shared(self) -> set[int]:
        """The shared values that it takes."""
        return {term.value for terms in (self.terms, *(layer.terms for layer in self.layers)) for term in terms}


def passes_through(node: Node, size: tuple[Any, ...]) -> bool:
    """Whether an operation leaves a value as it is; `size`: of its images."""
    return node.op in _PASS_THROUGH or (node.op == "adaptive_avg_pool2d" and _pair(node.args[1]) == tuple(size))


def step_layers(step: VaryingStep, points: int, size: tuple[Any, ...]) -> list[Layer] | str:
    """A step as layers, or why the engine does not have it; `size`: of the images that it takes, () for rows."""
    node = step.node
    image = len(size) == 2
    if node.op == "flatten" and image:
        return [Layer(op="flatten")]
    if isinstance(node.function, Take):
        ((axis, channels), *others) = node.function.along.items()
        if others or axis != features_axis(node):
            return "takes other parts than channels"
        return [Layer(op="take", geometry={"channels": channels.tolist()})]
    if image and (_over_pixels(node) or (node.op == "adaptive_avg_pool2d" and _pair(node.args[1]) == (1, 1))):
        pool = Layer(op="avg_pool2d", geometry={"kernel": _pair(size)})
        return [pool] if len(node.shape) == 4 else [pool, Layer(op="flatten")]
    if image and node.op in ("max_pool2d", "avg_pool2d"):
        geometry = pooling_of(node)
        return geometry if isinstance(geometry, str) else [Layer(op=node.op, geometry=geometry)]
    if (node.op == "conv2d" and image) or (node.op == "linear" and not image):
        layer = _product(node, [_blend(entry, points) for entry in step.entries])
        return layer if isinstance(layer, str) else [layer]
    return "is nothing that the engine has"


def _over_pixels(node: Node) -> bool:
    """Whether it is the mean over the pixels of images."""
    return node.op == "mean" and not node.kwargs and len(node.args) > 1 and {d % 4 for d in node.args[1] or ()} == {2, 3}


def _product(node: Node, entries: Sequence[tuple[list[np.ndarray], np.ndarray]]) -> Layer | str:
    """A linear layer or convolution from its weight and bias, each as arrays and their coefficients."""
    geometry = geometry_of(node) if node.op == "conv2d" else {}
    if isinstance(geometry, str):
        return geometry
    (weights, columns), *bias = entries
    biases, bias_columns = bias[0] if bias else ([], None)
    return Layer(op=node.op, geometry=geometry, weights=weights, columns=columns, biases=biases, bias_columns=bias_columns)


def features_axis(node: Node) -> int:
    """The axis of what the engine calls channels: of images the second, of rows the last."""
    return 1 if len(node.shape) == 4 else len(node.shape) - 1


def folds(before: Layer) -> bool:
    """Whether a norm behind a layer can be part of it."""
    return before.columns is not None and before.activation == "identity" and before.norm is None and before.adds is None


def affine(step: VaryingStep, points: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch norm with given statistics as scale and shift [points, channels]."""
    mean, var, weight, bias = (_vectors(step, i, absent, points) for i, absent in ((1, 0.0), (2, 1.0), (3, 1.0), (4, 0.0)))
    with np.errstate(invalid="ignore"):  # extrapolated variances may be negative: NaN, as PyTorch gives
        scale = weight / np.sqrt(var + step.node.args[5])
    return scale, bias - mean * scale


def batch_norm(step: VaryingStep, points: int, place: int) -> Layer:
    """A norm by the statistics of the batch, of the value of layer `place`."""
    node = step.node
    weight, bias = (_vectors(step, i, absent, points) for i, absent in ((1, 1.0), (2, 0.0)))
    scale, shift = (np.broadcast_to(v, (points, static(node.shape[1]))) for v in (weight, bias))
    return Layer(op="batch_norm", reads=place, norm=(scale, shift), geometry={"of": place, "eps": node.args[3]})


def _vectors(step: VaryingStep, position: int, absent: float, points: int) -> np.ndarray:
    """A norm's argument at every point [points, channels], or [1, 1] where there is none."""
    leaf = step.node.args[position]
    if leaf is None:
        return np.full((1, 1), absent)
    arrays, columns = _blend(step.entries[leaf.index], points)
    combined: np.ndarray = columns @ np.stack(arrays).astype(np.float64)
    return combined


def begin_with_layer(program: Program, chain: Chain) -> bool:
    """Let the engine compute what the planner has combined, where that takes little and a norm can be part of it."""
    steps = [program.shared[term.value] for term in chain.terms]
    if (
        chain.layers
        or chain.start.activation != "identity"
        or not steps
        or len({(s.node.id, s.inputs) for s in steps}) > 1
        or steps[0].node.op not in ("linear", "conv2d")
    ):
        return False
    if steps[0].entries[0][0].numel() > _DEPTH_PER_TERM * len(steps):
        return False
    columns = np.stack([term.column for term in chain.terms], axis=1)
    layer = _product(
        steps[0].node, [([e.contiguous().numpy() for e in es], columns) for es in zip(*(s.entries for s in steps))]
    )
    if isinstance(layer, str):
        return False
    layer.reads = -1
    chain.layers.append(layer)
    chain.terms = (Term(steps[0].inputs[0], np.ones(len(columns))),)
    return True


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument of an operation, however it was passed."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _pair(value: Any) -> tuple[int, int]:
    """(height, width) of what PyTorch takes as one or two numbers."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def geometry_of(node: Node) -> dict[str, Any] | str:
    """Stride, padding, dilation and groups of a convolution, or why the engine does not have it."""
    padding = argument(node, 4, "padding", 0)
    if isinstance(padding, str):
        return "is padded by name"
    geometry = {"stride": _pair(argument(node, 3, "stride", 1)), "padding": _pair(padding)}
    dilation, groups = _pair(argument(node, 5, "dilation", 1)), argument(node, 6, "groups", 1)
    unusual = {"dilation": dilation} if dilation != (1, 1) else {}
    return geometry | unusual | ({"groups": groups} if groups != 1 else {})


def pooling_of(node: Node) -> dict[str, Any] | str:
    """Kernel, stride and padding of a pooling, or why the engine does not have it."""
    kernel, padding = argument(node, 1, "kernel_size", 1), argument(node, 3, "padding", 0)
    stride = argument(node, 2, "stride", None) or kernel
    if node.op == "max_pool2d":
        plain = _pair(argument(node, 4, "dilation", 1)) == (1, 1) and not argument(node, 5, "ceil_mode", False)
    else:
        by_kernel = argument(node, 5, "count_include_pad", True) and argument(node, 6, "divisor_override", None) is None
        plain = by_kernel and not argument(node, 4, "ceil_mode", False)
    if not plain:
        return "rounds up, is dilated, or divides in its own way"
    return {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)}


def _blend(entry: Tensor | Moving, points: int) -> tuple[list[np.ndarray], np.ndarray]:
    """An entry as arrays and their coefficients [points, arrays]."""
    if isinstance(entry, Tensor):
        return [entry.contiguous().numpy()], np.ones((points, 1))
    return entry.arrays()


def activation_of(node: Node) -> Stage | None:
    """The engine's activation for a node, if it has it."""
    if node.op in ("relu", "tanh", "silu", "sigmoid"):
        return Stage(node.op)
    if node.op == "leaky_relu":
        return Stage("leaky_relu", float(node.args[1]) if len(node.args) > 1 else 0.01)
    if node.op == "gelu":
        return Stage("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")
    return None
