"""The native backend: chains of linear layers, convolutions, poolings and activations, fused in the C++ engine.

Each segment is looked at once. If what it does per point is such a chain, or adds up a combination of outputs, the engine
runs it for blocks of samples that stay in the cache. Any other segment is left to the reference backend, which also
computes the shared values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn import native
from modeconn.backends.reference import ReferenceBackend, Values
from modeconn.errors import ModeconnError
from modeconn.graph import Node
from modeconn.metrics import Head
from modeconn.plan.program import Combination, Moving, Program, Segment, Term, Varying, VaryingStep

# Points of one call into the engine: few enough that progress moves, many enough to fill the cores.
_POINTS = 16
# The same where only outputs are combined.
_POINTS_OF_OUTPUTS = 256
# The engine's sums, by the names that a head has for them.
_SUMS = {"loss": 0, "error": 1, "top5_error": 2}
_PASS_THROUGH = ("clone", "alias", "detach", "dropout", "contiguous")


@dataclass
class Stage:
    """Something that the engine does to a value, and the activation after it."""

    activation: str = "identity"
    slope: float = 0.01


@dataclass
class Layer(Stage):
    """A step of the engine: a linear layer or convolution Σ_g columns[:, g] weights[g], with a bias likewise, or a pooling.

    Attributes:
        norm: scale and shift [points, units] of a batch norm that follows.
    """

    op: str = "linear"
    geometry: dict[str, tuple[int, int]] = field(default_factory=dict)
    weights: list[np.ndarray] = field(default_factory=list)
    columns: np.ndarray | None = None
    biases: list[np.ndarray] = field(default_factory=list)
    bias_columns: np.ndarray | None = None
    norm: tuple[np.ndarray, np.ndarray] | None = None

    def at(self, points: slice) -> dict[str, Any]:
        """The step as the engine takes it, for some of the points."""
        step: dict[str, Any] = {"op": self.op, **self.geometry}
        if self.columns is not None:
            step |= {"weights": self.weights, "coefficients": np.ascontiguousarray(self.columns[points])}
            step |= {"activation": self.activation, "slope": self.slope}
        if self.bias_columns is not None:
            step |= {"biases": self.biases, "bias_coefficients": np.ascontiguousarray(self.bias_columns[points])}
        if self.norm is not None:
            scale, shift = self.norm
            step |= {"scale": np.ascontiguousarray(scale[points]), "shift": np.ascontiguousarray(shift[points])}
        return step


@dataclass
class Chain:
    """A segment as the engine takes it: the activation of Σ_j column_j V_j, then layers."""

    terms: tuple[Term, ...]
    start: Stage = field(default_factory=Stage)
    layers: list[Layer] = field(default_factory=list)

    @property
    def constant(self) -> bool:
        """Whether every point has the same output, so that there is next to nothing to do."""
        return not self.layers and all(np.ptp(term.column) == 0 for term in self.terms)


class CannotRun(ModeconnError):
    """The engine can run nothing of a program; the text says why."""


class NativeBackend(ReferenceBackend):
    """Runs chains in the C++ engine and everything else as the reference backend does.

    Raises:
        CannotRun: the engine is not built, the device is not the CPU, or no segment is a chain.
    """

    name = "native"

    def __init__(self, program: Program, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(program, dtype, device)
        if device.type != "cpu":
            raise _cannot(f"it computes on the CPU, and the device is {device}")
        if not native.available():
            raise _cannot(f"the C++ extension is not available: {native.reason()}")
        self._chains = {segment.index: find_chain(program, segment) for segment in program.segments}
        reasons = [reason for reason in self._chains.values() if isinstance(reason, str)]
        if len(reasons) == len(self._chains):
            raise _cannot(reasons[0])
        # A chain may begin with another value than the planner's: the input of a layer that has a norm behind it.
        self._kept |= {t.value for chain in self._chains.values() if isinstance(chain, Chain) for t in chain.terms}

    def sums(self, segment: Segment, values: Values, targets: Tensor, head: Head, tick: Callable[..., None]) -> Tensor:
        chain = self._chains[segment.index]
        if not isinstance(chain, Chain) or not head.builtin or chain.constant:
            return super().sums(segment, values, targets, head, tick)
        engine = native.extension()
        terms = [values[term.value].contiguous().numpy() for term in chain.terms]
        columns = np.stack([term.column for term in chain.terms], axis=1)
        sums = head.zeros(len(segment.rows), targets.device)
        wanted = [_SUMS[name] for name in head.names]
        together = _POINTS if chain.layers else _POINTS_OF_OUTPUTS
        for start in range(0, len(sums), together):
            points = slice(start, min(start + together, len(sums)))
            part = engine.chain_sums(
                terms,
                columns[points],
                [layer.at(points) for layer in chain.layers],
                targets.contiguous().numpy(),
                top5="top5_error" in head.names,
                activation=chain.start.activation,
                slope=chain.start.slope,
                threads=torch.get_num_threads(),
            )
            sums[points] = torch.from_numpy(part[:, wanted])
            tick(points.stop - points.start)
        return sums


def find_chain(program: Program, segment: Segment) -> Chain | str:
    """The segment as a chain, or why it is none."""
    output = program.graph.tensor_output
    if output is None:
        return "the network returns more than one tensor"
    if len(program.graph.nodes[output].shape) != 2:
        return "the network's output is not [N, classes]"
    form = segment.outputs[output]
    if isinstance(form, Combination):
        return Chain(form.terms)
    chain = Chain(())
    for index, step in enumerate(segment.steps):
        reads = step.combine if step.combine is not None else step.inputs[0] if len(step.inputs) == 1 else None
        if not step.node.batched or len(step.node.shape) not in (2, 4) or reads is None:
            return f"{_where(step.node)} is not part of a chain of linear layers and convolutions"
        if index == 0 and isinstance(reads, Combination):
            chain.terms = reads.terms
        elif reads != index - 1:
            return f"{_where(step.node)} does not follow the step before it"
        reason = "" if step.combine is not None else _append(program, chain, step, len(segment.rows))
        if reason:
            return f"{_where(step.node)} {reason}"
    return chain if isinstance(form, Varying) and form.step == len(segment.steps) - 1 else "the output is not the last step"


def _append(program: Program, chain: Chain, step: VaryingStep, points: int) -> str:
    """Add a step to the chain; why it cannot be added, if so."""
    node = step.node
    size = program.graph.nodes[node.inputs[0]].shape[2:]
    if node.op in _PASS_THROUGH or (node.op == "adaptive_avg_pool2d" and _pair(node.args[1]) == tuple(size)):
        return ""
    if node.op == "batch_norm":
        return _append_norm(program, chain, step, points)
    layer = _layer(step, points, size)
    if isinstance(layer, Layer):
        chain.layers.append(layer)
    if layer is not None:
        return layer if isinstance(layer, str) else ""
    activation = _activation(node)
    if activation is None:
        return "is nothing that the engine has"
    before: Stage = chain.layers[-1] if chain.layers else chain.start
    if before.activation != "identity" or (isinstance(before, Layer) and before.columns is None):
        return "does not follow a linear layer or a convolution"
    before.activation, before.slope = activation.activation, activation.slope
    return ""


def _layer(step: VaryingStep, points: int, size: tuple[Any, ...]) -> Layer | str | None:
    """The step as a layer, why the engine does not have it, or None if it is no layer at all."""
    node = step.node
    if node.op == "flatten":
        return Layer(op="flatten")
    if node.op == "adaptive_avg_pool2d" and _pair(node.args[1]) == (1, 1):
        return Layer(op="avg_pool2d", geometry={"kernel": _pair(size)})
    if node.op in ("max_pool2d", "avg_pool2d"):
        geometry = _pooling(node)
        return geometry if isinstance(geometry, str) else Layer(op=node.op, geometry=geometry)
    if node.op == "conv2d" or (node.op == "linear" and len(node.shape) == 2):
        return _product(node, [_blend(entry, points) for entry in step.entries])
    return None


def _product(node: Node, entries: Sequence[tuple[list[np.ndarray], np.ndarray]]) -> Layer | str:
    """A linear layer or convolution from its weight and bias, each as arrays and their coefficients."""
    geometry = _geometry(node) if node.op == "conv2d" else {}
    if isinstance(geometry, str):
        return geometry
    (weights, columns), *bias = entries
    biases, bias_columns = bias[0] if bias else ([], None)
    return Layer(op=node.op, geometry=geometry, weights=weights, columns=columns, biases=biases, bias_columns=bias_columns)


def _append_norm(program: Program, chain: Chain, step: VaryingStep, points: int) -> str:
    """Fold a batch norm with given statistics into the layer before it."""
    if not chain.layers:
        reason = _begin_with_layer(program, chain)
        if reason:
            return reason
    before = chain.layers[-1]
    if before.columns is None or before.activation != "identity" or before.norm is not None:
        return "does not follow a linear layer or a convolution"

    def vectors(position: int, absent: float) -> np.ndarray:
        leaf = step.node.args[position]
        if leaf is None:
            return np.full((1, 1), absent)
        arrays, columns = _blend(step.entries[leaf.index], points)
        combined: np.ndarray = columns @ np.stack(arrays).astype(np.float64)
        return combined

    mean, var, weight, bias = (vectors(i, absent) for i, absent in ((1, 0.0), (2, 1.0), (3, 1.0), (4, 0.0)))
    with np.errstate(invalid="ignore"):  # extrapolated variances may be negative: NaN, as PyTorch gives
        scale = weight / np.sqrt(var + step.node.args[5])
    before.norm = scale, bias - mean * scale
    return ""


def _begin_with_layer(program: Program, chain: Chain) -> str:
    """Let the engine compute what the planner has combined: it folds norms into layers only. Why it cannot, if so."""
    steps = [program.shared[term.value] for term in chain.terms]
    if len({(step.node.id, step.inputs) for step in steps}) > 1 or steps[0].node.op not in ("linear", "conv2d"):
        return "follows neither a linear layer nor a convolution"
    columns = np.stack([term.column for term in chain.terms], axis=1)
    layer = _product(
        steps[0].node, [([e.contiguous().numpy() for e in es], columns) for es in zip(*(s.entries for s in steps))]
    )
    if isinstance(layer, str):
        return layer
    chain.layers.append(layer)
    chain.terms = (Term(steps[0].inputs[0], np.ones(len(columns))),)
    return ""


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument of an operation, however it was passed."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _pair(value: Any) -> tuple[int, int]:
    """(height, width) of what PyTorch takes as one or two numbers."""
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _geometry(node: Node) -> dict[str, tuple[int, int]] | str:
    """Stride and padding of a convolution, or why the engine does not have it."""
    padding = _argument(node, 4, "padding", 0)
    if isinstance(padding, str) or _pair(_argument(node, 5, "dilation", 1)) != (1, 1) or _argument(node, 6, "groups", 1) != 1:
        return "is dilated, grouped, or padded by name"
    return {"stride": _pair(_argument(node, 3, "stride", 1)), "padding": _pair(padding)}


def _pooling(node: Node) -> dict[str, tuple[int, int]] | str:
    """Kernel, stride and padding of a pooling, or why the engine does not have it."""
    kernel, padding = _argument(node, 1, "kernel_size", 1), _argument(node, 3, "padding", 0)
    stride = _argument(node, 2, "stride", None) or kernel
    if node.op == "max_pool2d":
        plain = _pair(_argument(node, 4, "dilation", 1)) == (1, 1) and not _argument(node, 5, "ceil_mode", False)
    else:
        by_kernel = _argument(node, 5, "count_include_pad", True) and _argument(node, 6, "divisor_override", None) is None
        plain = by_kernel and not _argument(node, 4, "ceil_mode", False)
    if not plain:
        return "rounds up, is dilated, or divides in its own way"
    return {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)}


def _blend(entry: Tensor | Moving, points: int) -> tuple[list[np.ndarray], np.ndarray]:
    """An entry as arrays and their coefficients [points, arrays]."""
    if isinstance(entry, Tensor):
        return [entry.contiguous().numpy()], np.ones((points, 1))
    return entry.arrays()


def _activation(node: Node) -> Stage | None:
    """The engine's activation for a node, if it has it."""
    if node.op in ("relu", "tanh", "silu", "sigmoid"):
        return Stage(node.op)
    if node.op == "leaky_relu":
        return Stage("leaky_relu", float(node.args[1]) if len(node.args) > 1 else 0.01)
    if node.op == "gelu":
        return Stage("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")
    return None


def _cannot(reason: str) -> CannotRun:
    return CannotRun(f'backend "native" cannot run this: {reason}; ask for "reference" or "auto"')


def _where(node: Node) -> str:
    return f"{node.op} ({node.source})"
