"""Operations of the graph as steps of the C++ engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.backends.activations import IDENTITY
from modeconn.backends.base import attempt
from modeconn.backends.native.layers import Layer, StepGraph
from modeconn.backends.node_reading import (
    convolution_geometry,
    of_dtype,
    operands,
    pair,
    pooling_geometry,
    unsupported,
)
from modeconn.capture.graph import Entry, In, Node
from modeconn.capture.ops import Take
from modeconn.capture.optimisations import current
from modeconn.errors import Unsupported
from modeconn.plan.program import Moving, Program, Term, VaryingStep
from modeconn.plan.units import Shape, static

# So many multiply-adds for a value take no longer than reading a term of it that is combined.
DEPTH_PER_TERM = 16
_ARITHMETIC = ("add", "sub", "mul", "div", "neg")
_PARTS = "parts of channels, and every n-th row or column of pixels from the first on"


def lower(step: VaryingStep, points: int, before: Shape) -> list[Layer]:
    """The layers that a step of one input is.

    Args:
        points: of the segment.
        before: the shape of the input.

    Raises:
        Unsupported: the engine does not have it.
    """
    node = step.node
    image, size = len(before) == 4, before[2:]
    rows = image and len(node.shape) == 2
    if rows and node.op in ("flatten", "squeeze"):
        return [Layer(op="flatten")]
    if isinstance(node.function, Take):
        return _parts(node, node.function.along, size)
    if node.op in _ARITHMETIC:
        return [_scale_and_shift(step, points, before)]
    if node.op in ("group_norm", "layer_norm"):
        return [_norm_of_samples(step, points)]
    if not image and node.op == "addmm" and _is_plain_addmm(node):
        return [_transposed(step, points)]
    if (node.op == "conv2d" and image) or (node.op == "linear" and not image):
        return [_product(node, [_blend(entry, points) for entry in step.entries])]
    if image and node.op == "slice":
        return _every_other(node, size)
    if image and node.op == "pad":
        return [_more_channels(node)]
    if image and _over_pixels(node):
        op = "max_pool2d" if node.op == "amax" else "avg_pool2d"
        pool = Layer(op=op, geometry={"kernel": pair(size)})
        return [pool, Layer(op="flatten")] if rows else [pool]
    if image and node.op in ("max_pool2d", "avg_pool2d"):
        return [Layer(op=node.op, geometry=pooling_geometry(node, ceil=True))]
    raise unsupported(node, "linear layers, convolutions, poolings, norms and activations")


def _is_plain_addmm(node: Node) -> bool:
    """Whether it is bias + value · weight [in, out]."""
    return list(node.arguments.values()) == [Entry(0), In(0), Entry(1), 1, 1]


def _transposed(step: VaryingStep, points: int) -> Layer:
    """addmm: a linear layer whose weight is [in, out]."""
    bias, (weights, coefficients) = (_blend(entry, points) for entry in step.entries)
    if any(array.ndim != 1 for array in bias[0]):
        raise unsupported(step.node, "addmm with a bias of one number per feature")
    across = [np.ascontiguousarray(array.T) for array in weights]
    return _weighted("linear", {}, (across, coefficients), bias)


def _over_pixels(node: Node) -> bool:
    """Whether it is the mean or the greatest over all pixels of images."""
    if node.op == "adaptive_avg_pool2d":
        return pair(node["output_size"]) == (1, 1)
    if node.op not in ("mean", "amax") or node.arguments.get("dtype") is not None:
        return False
    over = node.arguments.get("dim")
    return isinstance(over, list) and {axis % 4 for axis in over} == {2, 3}


def _every_other(node: Node, size: tuple[Any, ...]) -> list[Layer]:
    """Every so many rows or columns of images, from the first on."""
    axis, bounds = node["dim"] % 4, [node[name] for name in ("start", "end", "step")]
    if axis < 2 or not all(bound is None or isinstance(bound, int) for bound in bounds):
        raise unsupported(node, _PARTS)
    return _parts(node, {axis: np.arange(static(size[axis - 2]))[slice(*bounds)]}, size)


def _parts(node: Node, along: Mapping[int, np.ndarray], size: tuple[Any, ...]) -> list[Layer]:
    """Indices along some axes: "take" of channels, a pooling of windows of one pixel of pixels."""
    layers = []
    for axis, index in along.items():
        if axis == features_axis(node):
            layers.append(Layer(op="take", geometry={"channels": index.tolist()}))
            continue
        if axis < 2:
            raise unsupported(node, _PARTS)
        pixels = static(size[axis - 2])
        stride = int(index[1] - index[0]) if len(index) > 1 else pixels
        if not np.array_equal(index, np.arange(0, pixels, stride)):
            raise unsupported(node, _PARTS)
        strides = (stride, 1) if axis == 2 else (1, stride)
        layers.append(Layer(op="avg_pool2d", geometry={"kernel": (1, 1), "stride": strides}))
    return layers


def _more_channels(node: Node) -> Layer:
    """Channels of zeros before and behind those of images."""
    width = node["pad"]
    constant = node["mode"] == "constant" and not node["value"]
    if not constant or len(width) != 6 or any(width[:4]) or min(width) < 0:
        raise unsupported(node, "pad with channels of zeros", "pad")
    own = range(static(node.shape[1]) - width[4] - width[5])
    return Layer(op="take", geometry={"channels": [-1] * width[4] + list(own) + [-1] * width[5]})


def _scale_and_shift(step: VaryingStep, points: int, before: Shape) -> Layer:
    """Arithmetic with a number, or with an entry that has one for all or one for each channel."""
    node = step.node
    _check_arithmetic(node)
    if list(map(str, before)) != list(map(str, node.shape)):
        raise unsupported(node, f"{node.op} without broadcasting of the value over other axes")
    value_first, other = True, 0.0
    if node.op != "neg":
        first, second = operands(node)
        value_first = first == In(0)
        other = second if value_first else first
    if node.op == "div" and not value_first:
        raise unsupported(node, "div of a value by a number, not of a number by a value")
    number = _number_per_channel(step, other, points)
    one, none = np.ones_like(number), np.zeros_like(number)
    with np.errstate(divide="ignore"):
        scale, shift = {
            "mul": (number, none),
            "div": (1 / number, none),
            "add": (one, number),
            "neg": (-one, none),
            "sub": (one, -number) if value_first else (-one, number),
        }[node.op]
    channels = static(node.shape[features_axis(node)])
    return Layer(op="affine", norm=(_wide(scale, points, channels), _wide(shift, points, channels)))


def _check_arithmetic(node: Node) -> None:
    """Raises Unsupported for a factor or a rounding of arithmetic."""
    for argument, value in (("alpha", 1), ("rounding_mode", None)):
        if node.arguments.get(argument, value) != value:
            raise unsupported(node, f"{node.op} without {argument}", argument)


def _number_per_channel(step: VaryingStep, other: Any, points: int) -> np.ndarray:
    """An operand of arithmetic at every point, [points, channels] or [points, 1]."""
    node = step.node
    if isinstance(other, int | float):
        return np.full((points, 1), float(other))
    if not isinstance(other, Entry):
        raise unsupported(node, f"{node.op} with a number, a parameter or a buffer")
    entry = step.entries[other.index]
    shape = tuple(entry.shape if isinstance(entry, Tensor) else entry.like.shape)
    axis, axes = features_axis(node), len(node.shape)
    aligned = [1] * (axes - len(shape)) + list(shape)
    aligned[axis] = 1
    per_channel = len(aligned) == axes and all(size == 1 for size in aligned)
    if not per_channel or np.prod(shape) not in (1, static(node.shape[axis])):
        raise unsupported(node, f"{node.op} with a parameter or buffer of one number per channel")
    return vectors_of(step, other, 0.0, points)


def _norm_of_samples(step: VaryingStep, points: int) -> Layer:
    """A group norm, or a layer norm over the features of rows, as one of a single group."""
    node = step.node
    channels, groups = static(node.shape[features_axis(node)]), 1
    if node.op == "layer_norm":
        if len(node.shape) == 4 or list(node["normalized_shape"]) != [node.shape[-1]]:
            raise unsupported(node, "layer_norm over the last axis of rows", "normalized_shape")
    else:
        groups = node["num_groups"]
        if len(node.shape) == 3:
            raise unsupported(node, "group_norm of images [N, C, H, W] or rows [N, C]")
    scale = _wide(vectors_of(step, node["weight"], 1.0, points), points, channels)
    shift = _wide(vectors_of(step, node["bias"], 0.0, points), points, channels)
    geometry = {"groups": groups, "eps": node["eps"]}
    return Layer(op="group_norm", geometry=geometry, norm=(scale, shift))


def _product(node: Node, entries: Sequence[tuple[list[np.ndarray], np.ndarray]]) -> Layer:
    """A linear layer or convolution from its weight and bias, as arrays and their coefficients."""
    geometry = convolution_geometry(node) if node.op == "conv2d" else {}
    weights, *bias = entries
    return _weighted(node.op, geometry, weights, bias[0] if bias else ([], None))


def _weighted(
    op: str,
    geometry: dict[str, Any],
    weights: tuple[list[np.ndarray], np.ndarray],
    bias: tuple[list[np.ndarray], np.ndarray | None],
) -> Layer:
    """A layer of weights and a bias, each as arrays and their coefficients."""
    biases, bias_coefficients = bias
    return Layer(
        op=op,
        geometry=geometry,
        weights=weights[0],
        coefficients=weights[1],
        biases=biases,
        bias_coefficients=bias_coefficients,
    )


def features_axis(node: Node) -> int:
    """The axis of what the engine calls channels: of images the second, of rows the last."""
    return 1 if len(node.shape) == 4 else len(node.shape) - 1


def folds(before: Layer) -> bool:
    """Whether a norm behind a layer can be part of it."""
    return current().folding and before.weighted and before.bare and before.norm is None


def affine(step: VaryingStep, points: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch norm with given statistics as scale and shift, [points, channels] each."""
    node = step.node
    mean = vectors_of(step, node["mean"], 0.0, points)
    var = vectors_of(step, node["var"], 1.0, points)
    weight = vectors_of(step, node["weight"], 1.0, points)
    bias = vectors_of(step, node["bias"], 0.0, points)
    # Extrapolated variances may be negative: NaN, as PyTorch gives.
    with np.errstate(invalid="ignore"):
        scale = weight / np.sqrt(var + node["eps"])
    return scale, bias - mean * scale


def batch_norm(step: VaryingStep, points: int, place: int) -> Layer:
    """A norm by the statistics of the batch, of the value of layer `place`."""
    node = step.node
    channels = static(node.shape[1])
    scale = _wide(vectors_of(step, node["weight"], 1.0, points), points, channels)
    shift = _wide(vectors_of(step, node["bias"], 0.0, points), points, channels)
    geometry = {"of": place, "eps": node["eps"]}
    return Layer(op="batch_norm", reads=place, norm=(scale, shift), geometry=geometry)


def vectors_of(step: VaryingStep, leaf: Any, absent: float, points: int) -> np.ndarray:
    """An entry at every point, [points, numel], or [1, 1] of `absent` where there is none."""
    if leaf is None:
        return np.full((1, 1), absent)
    arrays, coefficients = _blend(step.entries[leaf.index], points)
    flat = np.stack(arrays).reshape(len(arrays), -1).astype(np.float64)
    combined: np.ndarray = coefficients @ flat
    if not np.isfinite(flat).all():  # of one point, perhaps: 0 times it would be NaN at the others
        for point, row in enumerate(coefficients):
            combined[point] = row[row != 0] @ flat[row != 0]
    return combined


def begin_with_layer(program: Program, steps: StepGraph, most: float = DEPTH_PER_TERM) -> bool:
    """Lets the engine compute what the planner has combined, where that takes little.

    A norm behind it can then be part of the layer.

    Args:
        most: multiply-adds for a value and term.

    Returns:
        Whether it was done.
    """
    combined = [program.shared[term.value] for term in steps.terms]
    bare = not steps.layers and steps.activation == IDENTITY
    if not bare or not combined or not current().folding:
        return False
    node, entries = combined[0].node, combined[0].entries
    same = len({(step.node.id, step.inputs) for step in combined}) == 1
    if not same or node.op not in ("linear", "conv2d"):
        return False
    every = itertools.chain.from_iterable(step.entries for step in combined)
    if not all(of_dtype(entry, program.dtype) for entry in every):
        return False
    if entries[0][0].numel() > most * len(combined):
        return False
    coefficients = np.stack([term.coefficients for term in steps.terms], axis=1)
    by_entry = zip(*(step.entries for step in combined))
    parts = [(_arrays(tensors), coefficients) for tensors in by_entry]
    layer = attempt(lambda: _product(node, parts))
    if isinstance(layer, Unsupported):
        return False
    layer.reads = -1
    steps.layers.append(layer)
    steps.terms = (Term(combined[0].inputs[0], np.ones(len(coefficients))),)
    return True


def _arrays(tensors: Iterable[Tensor]) -> list[np.ndarray]:
    return [tensor.contiguous().numpy() for tensor in tensors]


def _blend(entry: Tensor | Moving, points: int) -> tuple[list[np.ndarray], np.ndarray]:
    """An entry as arrays and their coefficients [points, arrays]."""
    if isinstance(entry, Tensor):
        return [entry.contiguous().numpy()], np.ones((points, 1))
    return entry.arrays()


def _wide(vector: np.ndarray, points: int, channels: int) -> np.ndarray:
    """[points or 1, channels or 1] as [points, channels]."""
    return np.broadcast_to(vector, (points, channels))
