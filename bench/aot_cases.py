"""The default configurations of the kernels, with the types of their arguments, for the report.

A table per file of kernels/. A new kernel adds its own to `CASES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modeconn.kernels import (
    chain_gradients,
    linear_gradients,
    materialize,
    path_conv2d,
    path_cross_entropy,
    path_linear,
    path_mlp,
    path_norm,
    path_pool2d,
)
from modeconn.kernels.launch import PRECISIONS

Types = dict[str, str]


@dataclass(frozen=True)
class AotCase:
    """A default configuration of a kernel, which can be compiled without a GPU.

    Attributes:
        name: its line in the report.
        kernel: the jitted function.
        signature: the Triton type of each argument at run time, ":16" behind it where it is
            divisible by 16.
        constexprs: the values of the others.
        tensor_cores: whether the machine code must use them.
        archs: the compute capabilities on which it is the default.
    """

    name: str
    kernel: Any
    signature: Types
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    archs: tuple[int, ...] = (80, 90, 100)


def _pointers(*names: str, to: str = "fp32") -> Types:
    """Types of tensors, which PyTorch allocates on multiples of 16 bytes."""
    return dict.fromkeys(names, f"*{to}:16")


def _integers(*names: str) -> Types:
    return dict.fromkeys(names, "i32")


def _multiples(*names: str) -> Types:
    """Types of integers that are multiples of 16: strides of padded rows, and common sizes."""
    return dict.fromkeys(names, "i32:16")


def _linear_arguments(precision: str, blends: bool) -> tuple[Types, dict[str, Any]]:
    """The types and constants of `linear_tile`'s arguments, of padded rows.

    Args:
        blends: whether input and weights are combinations of two terms, summed in the kernel.
    """
    weights = "bf16" if precision == "bf16" and not blends else "fp32"
    types = _pointers("x", "x_coefficients", "w_coefficients", "bias", "bias_coefficients")
    types |= _pointers("w", to=weights) | _integers("b_term", "depth") | {"input_slope": "fp32"}
    types |= _multiples("x_stride", "x_row", "w_stride", "w_unit", "read_depth")
    constants: dict[str, Any] = {"x_depth": 1, "w_depth": 1, "b_unit": 1}
    constants |= {"X_TERMS": 2 * blends, "W_TERMS": 2 * blends, "B_TERMS": 2}
    constants |= {"PRECISION": precision, "X_PADDED": True, "BLOCK_K": path_linear.BLOCK_K}
    constants["INPUT_ACTIVATION"] = "relu" if blends else "identity"
    return types, constants


def linear_cases() -> list[AotCase]:
    """Layers of a line, 64 and 245 wide.

    One x per point and materialized weights; a combined x and weights blended in the kernel.
    """
    choices = itertools.product((64, 245), PRECISIONS.values(), (False, True))
    return [_linear_case(*choice) for choice in choices]


def _linear_case(width: int, precision: str, blends: bool) -> AotCase:
    config = path_linear.default_blocks(1000, width, precision)
    types, constants = _linear_arguments(precision, blends)
    types |= _integers("points", "rows", "group_rows", "units") | _pointers("out")
    types |= _multiples("out_point", "out_row", "out_units") | {"slope": "fp32"}
    tile = f"{config.kwargs['BLOCK_M']}x{config.kwargs['BLOCK_N']}"
    return AotCase(
        f"path_linear {precision} {tile}{' blended' if blends else ''}",
        path_linear.linear_kernel,
        types,
        constants | {"ACTIVATION": "relu", **config.kwargs},
        config.num_warps,
        config.num_stages,
        precision != "ieee",
    )


def cross_entropy_cases() -> list[AotCase]:
    """The last layer of a line, 245 → 10 and → 1000 classes, and combined logits of both sizes."""
    cases = []
    for classes in (10, 1000):
        cases += [_cross_entropy_case(classes, dot, False) for dot in PRECISIONS.values()]
        cases.append(_cross_entropy_case(classes, "tf32x3", True))
    return cases


def _cross_entropy_case(classes: int, precision: str, given: bool) -> AotCase:
    config = path_cross_entropy.blocks(classes, given)
    top5 = classes > 10
    types, constants = _linear_arguments(precision, given)
    types |= _integers("points", "rows", "row_tiles", "group_rows", "units")
    types |= _pointers("targets", to="i64") | _pointers("sums", to="fp64")
    one_tile = path_cross_entropy.in_one_tile(config, classes, given, top5, torch.device("cpu"))
    constants |= {"GIVEN": given, "TOP5": top5, "ONE_TILE": one_tile}
    if given:
        constants |= {"W_TERMS": 0, "B_TERMS": 0}
    return AotCase(
        f"path_cross_entropy {'of combined logits' if given else precision} {classes} classes",
        path_cross_entropy.cross_entropy_kernel,
        types,
        constants | config.kwargs,
        config.num_warps,
        config.num_stages,
        not given,
    )


def mlp_cases() -> list[AotCase]:
    """Layers of 245 units, the input a combination of two values, 10 classes, top-5 errors too."""
    choices = itertools.product(PRECISIONS.values(), ((80, 90), (100,)))
    return [_mlp_case(*choice) for choice in choices]


def _mlp_case(precision: str, archs: tuple[int, ...]) -> AotCase:
    values = "bf16" if precision == "bf16" else "fp32"
    types = _pointers("x", "x_coefficients", "biases") | _pointers("weights", "scratch", to=values)
    types |= _pointers("widths", to="i32") | _pointers("targets", to="i64")
    types |= _pointers("sums", to="fp64") | _multiples("x_stride", "x_row", "read_depth")
    types |= _integers("rows", "depth", "classes", "hidden", "row_tiles", "tiles", "programs")
    types |= dict.fromkeys(("slope", "last_slope", "input_slope"), "fp32")
    constants: dict[str, Any] = {"x_depth": 1, "X_TERMS": 2, "X_PADDED": True, "TOP5": True}
    constants |= {"ACTIVATION": "relu", "INPUT_ACTIVATION": "relu", "LAST_ACTIVATION": "identity"}
    constants |= {"PRECISION": precision, "SIZE": 256}
    blocks = path_mlp.blocks(256, 10, precision, archs == (100,))
    warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
    return AotCase(
        f"path_mlp {precision}",
        path_mlp.mlp_kernel,
        types,
        constants | blocks,
        warps,
        stages,
        precision != "ieee",
        archs,
    )


def conv2d_cases() -> list[AotCase]:
    """3×3 convolutions of 128, 32 and 16 channels, of a first layer's 3, and of two values."""
    return [
        *(_conv2d_case(128, 128, precision) for precision in PRECISIONS),
        _conv2d_case(32, 32, "float32"),
        _conv2d_case(16, 16, "float32"),
        _conv2d_case(3, 64, "float32"),
        _conv2d_case(64, 64, "float32", terms=2),
    ]


def _conv2d_case(channels: int, units: int, precision: str, terms: int = 0) -> AotCase:
    dot = PRECISIONS[precision]
    config = path_conv2d.default_config(units, dot)
    types = _pointers("x", "x_coefficients", "scale", "shift", "residual", "out")
    types |= _pointers("w", to="bf16" if precision == "bf16" else "fp32")
    types |= _integers("group_rows", "points") | dict.fromkeys(("slope", "input_slope"), "fp32")
    types |= _multiples("x_stride", "residual_stride", "pixels", "height", "width", "units")
    types |= _multiples("out_height", "out_width", "depth")
    types |= _integers("channels") if channels % 16 else _multiples("channels")
    ones = ("SH", "SW", "PH", "PW", "HAS_SCALE", "HAS_SHIFT", "HAS_RESIDUAL")
    constants: dict[str, Any] = dict.fromkeys(ones, 1)
    constants |= {"KH": 3, "KW": 3, "FLAT": channels if channels < path_conv2d.BLOCK_K else 0}
    constants |= {"INPUT_ACTIVATION": "relu", "ACTIVATION": "relu", "X_TERMS": terms}
    constants |= {"PRECISION": dot, "BLOCK_K": path_conv2d.BLOCK_K, **config.kwargs}
    return AotCase(
        f"conv2d {channels}→{units}{f' of {terms} terms' if terms else ''} {precision}",
        path_conv2d.conv2d_kernel,
        types,
        constants,
        config.num_warps,
        config.num_stages,
        True,
    )


def norm_cases() -> list[AotCase]:
    """Rows of 768, in one piece, and of 8192, in two."""
    types = _pointers("x", "weight", "bias", "out") | _multiples("rows", "width", "x_stride")
    types |= _integers("points") | {"eps": "fp32"}
    short: dict[str, Any] = {"HAS_WEIGHT": True, "BLOCK_M": 4, "BLOCK_N": 1024}
    long: dict[str, Any] = {"HAS_WEIGHT": True, "BLOCK_M": 1, "BLOCK_N": path_norm.ELEMENTS}
    layer: dict[str, Any] = {"CENTRED": True, "HAS_BIAS": True}
    rms: dict[str, Any] = {"CENTRED": False, "HAS_BIAS": False}
    kernel = path_norm.row_norm_kernel
    return [
        AotCase("layer norm", kernel, types, layer | short),
        AotCase("layer norm of long rows", kernel, types, layer | long),
        AotCase("RMS norm", kernel, types, rms | short),
    ]


def pool2d_cases() -> list[AotCase]:
    """2×2 windows of 64 channels."""
    types = _pointers("x", "out")
    types |= _multiples("pixels", "height", "width", "out_height", "out_width", "channels")
    constants: dict[str, Any] = {"KH": 2, "KW": 2, "SH": 2, "SW": 2, "PH": 0, "PW": 0}
    channels = path_pool2d.CHANNELS
    constants |= {"BLOCK_P": path_pool2d.ELEMENTS // channels, "BLOCK_C": channels}
    return [
        AotCase(
            f"{kind} pool", path_pool2d.pool2d_kernel, types, constants | {"MAX": kind == "max"}
        )
        for kind in path_pool2d.KINDS
    ]


def materialize_cases() -> list[AotCase]:
    """The weights of a line between two networks, written straight and transposed."""
    types = _pointers("tensors", "coefficients", "out")
    types |= _integers("points", "units", "depth", "term_stride", "unit_stride")
    straight = types | _integers("out_units")
    straight |= _multiples("out_depth", "out_point_stride", "out_unit_stride")
    turned = types | _integers("out_depth")
    turned |= _multiples("out_units", "out_point_stride", "out_depth_stride")
    constants = {"depth_stride": 1, "TERMS": 2, "BLOCK": materialize.BLOCK}
    kernel = materialize.materialize_kernel
    return [
        AotCase("materialize", kernel, straight, constants | {"out_depth_stride": 1}),
        AotCase("materialize transposed", kernel, turned, constants | {"out_unit_stride": 1}),
    ]


def linear_gradient_cases() -> list[AotCase]:
    """The control points' gradient of a layer 245 → 245 of a line, and the two steps around it."""
    cases = []
    for precision in PRECISIONS.values():
        cases += [_weight_gradient_case(precision, terms) for terms in (0, 2)]
    block: dict[str, Any] = {
        "ACTIVATION": "gelu",
        "ROWS": linear_gradients.ROWS,
        "COLUMNS": 2 * linear_gradients.COLUMNS,
    }
    of_rows = _pointers("grad", "y", "out") | _integers("rows", "units", "row_tiles")
    of_rows |= _multiples("grad_point", "grad_row", "y_point", "y_row", "out_point", "out_row")
    of_rows |= _multiples("out_units") | {"slope": "fp32"}
    shared = _pointers("grad", "x", "x_coefficients", "out")
    shared |= _integers("points", "rows", "depth", "out_term", "out_row") | {"slope": "fp32"}
    shared |= _multiples("grad_point", "grad_row", "x_term", "x_row")
    through, to_shared = (
        linear_gradients.activation_gradient_kernel,
        linear_gradients.shared_gradient_kernel,
    )
    return [
        *cases,
        AotCase("activation gradient", through, of_rows, block | {"grad_unit": 1}),
        AotCase("shared values' gradient", to_shared, shared, block | {"TERMS": 2, "x_depth": 1}),
    ]


def _weight_gradient_case(precision: str, terms: int) -> AotCase:
    types = _pointers("grad", "out", "w_coefficients", "x", "x_coefficients")
    types |= _integers("points", "rows", "units", "depth") | {"input_slope": "fp32"}
    types |= _multiples("x_stride", "x_row", "read_depth", "grad_point", "grad_row", "split_rows")
    types |= _integers("split_points", "row_splits", "out_split", "out_term")
    constants: dict[str, Any] = {"x_depth": 1, "X_TERMS": terms, "X_PADDED": True, "W_TERMS": 2}
    constants |= {"INPUT_ACTIVATION": "relu", "PRECISION": precision}
    constants |= {
        "ROWS": linear_gradients.product_rows(precision),
        "COLUMNS": linear_gradients.COLUMNS,
    }
    return AotCase(
        f"weight gradient {precision}{' of a combined x' if terms else ''}",
        linear_gradients.weight_gradient_kernel,
        types,
        constants,
        8,
        3,
        precision != "ieee",
    )


def chain_gradient_cases() -> list[AotCase]:
    """The gradient of 1000 classes' logits."""
    types = _pointers("z") | _pointers("targets", to="i64") | {"grad": "*fp32"}
    types |= _integers("z_point", "z_row", "rows", "classes", "row_tiles")
    kernel = chain_gradients.logits_gradient_kernel
    return [AotCase("logits' gradient", kernel, types, {"ROWS": 4, "COLUMNS": 1024})]


# By the kernels' files, in the report's order.
CASES: dict[str, Callable[[], list[AotCase]]] = {
    "chain_gradients": chain_gradient_cases,
    "materialize": materialize_cases,
    "linear_gradients": linear_gradient_cases,
    "path_conv2d": conv2d_cases,
    "path_cross_entropy": cross_entropy_cases,
    "path_linear": linear_cases,
    "path_mlp": mlp_cases,
    "path_norm": norm_cases,
    "path_pool2d": pool2d_cases,
}
