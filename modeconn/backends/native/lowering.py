"""What the graph's operations are as steps of the C++ engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.backends.native.layers import Chain, Layer, Stage
from modeconn.capture.graph import Entry, In, Node
from modeconn.capture.ops import Take
from modeconn.plan.program import Moving, Program, Term, VaryingStep
from modeconn.plan.units import Shape, static

# So many multiply-adds for a value take no longer than reading a term of it that is combined.
DEPTH_PER_TERM = 16
_ARITHMETIC = ("add", "sub", "mul", "div", "neg")
_OTHER_PARTS = "takes other parts than channels, or every so many pixels from the first on"
_PASS_THROUGH = ("clone", "alias", "detach", "dropout", "contiguous")


def passes_through(node: Node, before: Shape) -> bool:
    """Whether an operation leaves a value of a shape as it is."""
    return node.op in _PASS_THROUGH or (
        node.op == "adaptive_avg_pool2d" and _pair(node.args[1]) == tuple(before[2:])
    )


def step_layers(step: VaryingStep, points: int, before: Shape) -> list[Layer] | str:
    """A step as layers, or why the engine does not have it; `before`: the shape of what it takes."""
    node = step.node
    image, size = len(before) == 4, before[2:]
    rows = image and len(node.shape) == 2
    if rows and node.op in ("flatten", "squeeze"):
        return [Layer(op="flatten")]
    if isinstance(node.function, Take):
        return _parts(node.function.along, features_axis(node), size)
    if node.op in _ARITHMETIC:
        same = list(map(str, before)) == list(map(str, node.shape))
        return _scale_and_shift(step, points) if same else "is spread over other axes"
    if node.op in ("group_norm", "layer_norm"):
        return _norm_of_samples(step, points)
    if image and node.op == "slice":
        return _every_other(node, size)
    if image and node.op == "pad":
        return _more_channels(node, static(node.shape[1]))
    if image and (
        _over_pixels(node) or (node.op == "adaptive_avg_pool2d" and _pair(node.args[1]) == (1, 1))
    ):
        pool = Layer(
            op="max_pool2d" if node.op == "amax" else "avg_pool2d", geometry={"kernel": _pair(size)}
        )
        return [pool, Layer(op="flatten")] if rows else [pool]
    if image and node.op in ("max_pool2d", "avg_pool2d"):
        geometry = pooling_of(node, ceil=True)
        return geometry if isinstance(geometry, str) else [Layer(op=node.op, geometry=geometry)]
    if (node.op == "conv2d" and image) or (node.op == "linear" and not image):
        layer = _product(node, [_blend(entry, points) for entry in step.entries])
        return layer if isinstance(layer, str) else [layer]
    return "is nothing that the engine has"


def _over_pixels(node: Node) -> bool:
    """Whether it is the mean or the greatest over the pixels of images."""
    over = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], list) else []
    return node.op in ("mean", "amax") and not node.kwargs and {d % 4 for d in over} == {2, 3}


def _every_other(node: Node, size: tuple[Any, ...]) -> list[Layer] | str:
    """Every so many rows or columns of images, from the first on: a pooling whose windows are one pixel."""
    bounds = [*node.args[1:], *[0, None, None, 1][len(node.args) - 1 :]]
    axis = bounds[0] % 4
    if axis < 2 or not all(number is None or isinstance(number, int) for number in bounds):
        return _OTHER_PARTS
    return _parts({axis: np.arange(static(size[axis - 2]))[slice(*bounds[1:])]}, 1, size)


def _parts(
    along: Mapping[int, np.ndarray], features: int, size: tuple[Any, ...]
) -> list[Layer] | str:
    """Indices along some axes, as layers: some channels; every so many pixels, a pooling whose windows are one pixel."""
    layers = []
    for axis, index in along.items():
        if axis == features:
            layers.append(Layer(op="take", geometry={"channels": index.tolist()}))
            continue
        if axis < 2:
            return _OTHER_PARTS
        pixels = static(size[axis - 2])
        stride = int(index[1] - index[0]) if len(index) > 1 else pixels
        if not np.array_equal(index, np.arange(0, pixels, stride)):
            return _OTHER_PARTS
        layers.append(
            Layer(
                op="avg_pool2d",
                geometry={"kernel": (1, 1), "stride": (stride, 1) if axis == 2 else (1, stride)},
            )
        )
    return layers


def _more_channels(node: Node, channels: int) -> list[Layer] | str:
    """Channels of zeros before and behind those of images."""
    width, mode, value = (
        argument(node, 1, "pad", []),
        argument(node, 2, "mode", "constant"),
        argument(node, 3, "value", None),
    )
    if len(width) != 6 or any(width[:4]) or min(width) < 0 or mode != "constant" or value:
        return "adds something else than channels of zeros"
    own = range(channels - width[4] - width[5])
    return [Layer(op="take", geometry={"channels": [-1] * width[4] + list(own) + [-1] * width[5]})]


def _scale_and_shift(step: VaryingStep, points: int) -> list[Layer] | str:
    """Arithmetic with a number, or with an entry that has one for all or one for each channel."""
    node = step.node
    value_first = node.op == "neg" or node.args[0] == In(0)
    other = 0.0 if node.op == "neg" else node.args[1 if value_first else 0]
    channels, axis = static(node.shape[features_axis(node)]), features_axis(node)
    if isinstance(other, Entry):
        entry = step.entries[other.index]
        shape = tuple(entry.shape if isinstance(entry, Tensor) else entry.arrays()[0][0].shape)
        aligned = [1] * (len(node.shape) - len(shape)) + list(shape)
        aligned[axis] = 1
        if (
            len(aligned) > len(node.shape)
            or any(size != 1 for size in aligned)
            or np.prod(shape) not in (1, channels)
        ):
            return "takes an entry that has other numbers than one for each channel"
        number = vectors_of(step, other, 0.0, points)
    elif isinstance(other, int | float):
        number = np.full((points, 1), float(other))
    else:
        return "is no arithmetic of a value and numbers"
    if node.kwargs or (node.op == "div" and not value_first):
        return "is divided or scaled in its own way"
    one, none = np.ones_like(number), np.zeros_like(number)
    with np.errstate(divide="ignore"):
        scale, shift = {
            "mul": (number, none),
            "div": (1 / number, none),
            "add": (one, number),
            "neg": (-one, none),
            "sub": (one, -number) if value_first else (-one, number),
        }[node.op]
    wide = tuple(np.broadcast_to(part, (points, channels)) for part in (scale, shift))
    return [Layer(op="affine", norm=(wide[0], wide[1]))]


def _norm_of_samples(step: VaryingStep, points: int) -> list[Layer] | str:
    """A group norm, or a layer norm over the features of rows, as one of a single group."""
    node = step.node
    channels = static(node.shape[features_axis(node)])
    if node.op == "layer_norm":
        if len(node.shape) == 4 or list(node.args[1]) != [node.shape[-1]]:
            return "normalises over more than the features of rows"
        groups, eps = 1, argument(node, 4, "eps", 1e-5)
    else:
        if len(node.shape) == 3:
            return "normalises the second of three axes"
        groups, eps = node.args[1], argument(node, 4, "eps", 1e-5)
    vectors = (
        vectors_of(step, argument(node, i, key, None), absent, points)
        for i, key, absent in ((2, "weight", 1.0), (3, "bias", 0.0))
    )
    scale, shift = (np.broadcast_to(vector, (points, channels)) for vector in vectors)
    return [Layer(op="group_norm", geometry={"groups": groups, "eps": eps}, norm=(scale, shift))]


def _product(node: Node, entries: Sequence[tuple[list[np.ndarray], np.ndarray]]) -> Layer | str:
    """A linear layer or convolution from its weight and bias, each as arrays and their coefficients."""
    geometry = geometry_of(node) if node.op == "conv2d" else {}
    if isinstance(geometry, str):
        return geometry
    (weights, columns), *bias = entries
    biases, bias_coefficients = bias[0] if bias else ([], None)
    return Layer(
        op=node.op,
        geometry=geometry,
        weights=weights,
        coefficients=columns,
        biases=biases,
        bias_coefficients=bias_coefficients,
    )


def features_axis(node: Node) -> int:
    """The axis of what the engine calls channels: of images the second, of rows the last."""
    return 1 if len(node.shape) == 4 else len(node.shape) - 1


def folds(before: Layer) -> bool:
    """Whether a norm behind a layer can be part of it."""
    return (
        before.coefficients is not None
        and before.activation == "identity"
        and before.norm is None
        and before.adds is None
    )


def affine(step: VaryingStep, points: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch norm with given statistics as scale and shift [points, channels]."""
    mean, var, weight, bias = (
        vectors_of(step, step.node.args[i], absent, points)
        for i, absent in ((1, 0.0), (2, 1.0), (3, 1.0), (4, 0.0))
    )
    # extrapolated variances may be negative: NaN, as PyTorch gives
    with np.errstate(invalid="ignore"):
        scale = weight / np.sqrt(var + step.node.args[5])
    return scale, bias - mean * scale


def batch_norm(step: VaryingStep, points: int, place: int) -> Layer:
    """A norm by the statistics of the batch, of the value of layer `place`."""
    node = step.node
    weight, bias = (
        vectors_of(step, node.args[i], absent, points) for i, absent in ((1, 1.0), (2, 0.0))
    )
    scale, shift = (np.broadcast_to(v, (points, static(node.shape[1]))) for v in (weight, bias))
    return Layer(
        op="batch_norm",
        reads=place,
        norm=(scale, shift),
        geometry={"of": place, "eps": node.args[3]},
    )


def vectors_of(step: VaryingStep, leaf: Any, absent: float, points: int) -> np.ndarray:
    """An argument at every point [points, numbers of it], or [1, 1] where there is none."""
    if leaf is None:
        return np.full((1, 1), absent)
    arrays, columns = _blend(step.entries[leaf.index], points)
    combined: np.ndarray = columns @ np.stack(arrays).reshape(len(arrays), -1).astype(np.float64)
    return combined


def begin_with_layer(program: Program, chain: Chain, most: float = DEPTH_PER_TERM) -> bool:
    """Let the engine compute what the planner has combined, so that a norm can be part of it; where that takes little.

    Args:
        most: multiply-adds for a value and term.
    """
    steps = [program.shared[term.value] for term in chain.terms]
    if (
        chain.layers
        or chain.start.activation != "identity"
        or not steps
        or len({(s.node.id, s.inputs) for s in steps}) > 1
        or steps[0].node.op not in ("linear", "conv2d")
    ):
        return False
    if steps[0].entries[0][0].numel() > most * len(steps):
        return False
    columns = np.stack([term.coefficients for term in chain.terms], axis=1)
    layer = _product(
        steps[0].node,
        [
            ([e.contiguous().numpy() for e in es], columns)
            for es in zip(*(s.entries for s in steps))
        ],
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


def pooling_of(node: Node, ceil: bool = False) -> dict[str, Any] | str:
    """Kernel, stride and padding of a pooling, or why the engine does not have it.

    Args:
        ceil: whether a maximum may round its size up, which the geometry then tells.
    """
    kernel, padding = argument(node, 1, "kernel_size", 1), argument(node, 3, "padding", 0)
    stride = argument(node, 2, "stride", None) or kernel
    if node.op == "max_pool2d":
        up = bool(argument(node, 5, "ceil_mode", False))
        plain = _pair(argument(node, 4, "dilation", 1)) == (1, 1) and (ceil or not up)
    else:
        up = False
        by_kernel = (
            argument(node, 5, "count_include_pad", True)
            and argument(node, 6, "divisor_override", None) is None
        )
        plain = by_kernel and not argument(node, 4, "ceil_mode", False)
    if not plain:
        return "rounds up, is dilated, or divides in its own way"
    return {"kernel": _pair(kernel), "stride": _pair(stride), "padding": _pair(padding)} | (
        {"ceil": True} if up else {}
    )


def _blend(entry: Tensor | Moving, points: int) -> tuple[list[np.ndarray], np.ndarray]:
    """An entry as arrays and their coefficients [points, arrays]."""
    if isinstance(entry, Tensor):
        return [entry.contiguous().numpy()], np.ones((points, 1))
    return entry.arrays()


def activation_of(node: Node) -> Stage | None:
    """A node as an activation that the engine and the kernels for GPUs have, if it is one."""
    if (node.op == "clamp_min" and node.args[1:] == (0,)) or (
        node.op == "clamp" and not node.kwargs and node.args[1:] == (0,)
    ):
        return Stage("relu")
    if node.op in ("relu", "tanh", "silu", "sigmoid"):
        return Stage(node.op)
    if node.op == "leaky_relu":
        return Stage("leaky_relu", float(node.args[1]) if len(node.args) > 1 else 0.01)
    if node.op == "gelu":
        return Stage("gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu")
    return None


def engine_activation(node: Node) -> Stage | None:
    """A node as an activation that the engine has, if it is one."""
    if node.op in ("relu6", "hardsigmoid", "hardswish", "selu", "mish") and len(node.args) == 1:
        return Stage(node.op)
    if node.op in ("hardtanh", "clamp") and tuple(node.args[1:]) == (0, 6):
        return Stage("relu6")
    if node.op == "elu" and len(node.args) < 3:
        return Stage("elu", float(node.args[1]) if len(node.args) > 1 else 1.0)
    if node.op == "softplus" and tuple(node.args[1:]) in ((), (1,), (1, 20)) and not node.kwargs:
        return Stage("softplus")
    return activation_of(node)
