"""The last layer and the loss at many points, summed over the samples.

    z[t, n] = x[t, n] W(t)ᵀ + b(t), or the logits as they are given
    sums over n of loss, errors and top-5 errors (head.py)

No [T, N, classes] array is stored.

Floor: 2 T N depth classes operations, x read once (per point, or once in all), 24 bytes written per
point and row tile. With few classes it is bound by reading x (predicted, as for path_linear.py);
with a vocabulary by the products.

Layout: a program takes a tile of rows of one point through all tiles of classes, keeping one state
per row. Programs are ordered as in path_linear.py, and the weights materialized or blended by the
same choice. Ranks need the label's logit first, so for top-5 errors of more classes than fit one
tile the logits are made twice. Each program writes its sums; they are added in float64 in a fixed
order. The gradient makes the logits of some points again (chain_gradients.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modeconn.errors import ModeconnError
from modeconn.kernels.activations import act
from modeconn.kernels.arguments import (
    Options,
    PathLayer,
    Samples,
    check_layer,
    check_points,
    check_same_device,
    check_targets,
    samples_of,
)
from modeconn.kernels.blended import Blended
from modeconn.kernels.chain_gradients import chain_gradients
from modeconn.kernels.head import head_rank, head_reference, head_start, head_store, head_update
from modeconn.kernels.launch import (
    blackwell,
    chunks,
    dot_precision,
    launch,
    padded,
    tl,
    triton,
)
from modeconn.kernels.materialize import materialized
from modeconn.kernels.path_linear import (
    BLOCK_K,
    MATERIALIZED_BYTES,
    blends_in_prologue,
    path_linear_reference,
)
from modeconn.kernels.tiles import (
    aligned,
    bias_arguments,
    blended_arguments,
    linear_tile,
    load_samples,
    materialized_arguments,
    rows_of_a_group,
    sample_rows,
    samples_arguments,
    tile_of_program,
)


@triton.jit
def _logits(
    samples,
    weight,
    bias,
    row,
    c,
    t,
    INPUT_ACTIVATION: tl.constexpr,
    X_TERMS: tl.constexpr,
    X_PADDED: tl.constexpr,
    W_TERMS: tl.constexpr,
    B_TERMS: tl.constexpr,
    GIVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes a tile [rows, classes c] of logits, or reads it where the logits are given."""
    if GIVEN:
        x_rows = sample_rows(samples, row, t, X_TERMS)
        z = load_samples(x_rows, samples, row, c, t, INPUT_ACTIVATION, X_TERMS, X_PADDED)
        z = z.to(tl.float32)
    else:
        z = linear_tile(
            samples,
            weight,
            bias,
            row,
            c,
            t,
            INPUT_ACTIVATION,
            X_TERMS,
            X_PADDED,
            W_TERMS,
            B_TERMS,
            PRECISION,
            BLOCK_K,
        )
    return z


@triton.jit
def cross_entropy_kernel(
    x,
    x_coefficients,
    x_stride,
    x_row,
    x_depth,
    w,
    w_coefficients,
    w_stride,
    w_unit,
    w_depth,
    bias,
    bias_coefficients,
    b_term,
    b_unit,
    targets,
    sums,
    points,
    rows,
    units,
    depth,
    read_depth,
    row_tiles,
    group_rows,
    input_slope,
    INPUT_ACTIVATION: tl.constexpr,
    X_TERMS: tl.constexpr,
    X_PADDED: tl.constexpr,
    W_TERMS: tl.constexpr,
    B_TERMS: tl.constexpr,
    GIVEN: tl.constexpr,
    TOP5: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t, row_tile, _ = tile_of_program(points, rows, 1, group_rows, BLOCK_M)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    label = tl.load(targets + row, mask=row < rows, other=0).to(tl.int32)
    samples = x, x_coefficients, x_stride, x_row, x_depth, rows, depth, read_depth, input_slope
    weight = w, w_coefficients, w_stride, w_unit, w_depth, units
    bias_values = bias, bias_coefficients, b_term, b_unit
    state = head_start(BLOCK_M)
    rank = tl.zeros((BLOCK_M,), tl.int32)
    # The second pass counts ranks, which need the label's logit; with one tile both are one.
    PASSES: tl.constexpr = 2 if TOP5 and not ONE_TILE else 1
    for turn in tl.static_range(PASSES):
        for start in range(0, BLOCK_N if ONE_TILE else units, BLOCK_N):
            c = start + tl.arange(0, BLOCK_N)
            z = _logits(
                samples,
                weight,
                bias_values,
                row,
                c,
                t,
                INPUT_ACTIVATION,
                X_TERMS,
                X_PADDED,
                W_TERMS,
                B_TERMS,
                GIVEN,
                PRECISION,
                BLOCK_K,
            )
            if turn == 0:
                state = head_update(z, c, units, label, state)
            if TOP5 and turn == PASSES - 1:
                rank += head_rank(z, c, units, label, state)
    place = sums + (t.to(tl.int64) * row_tiles + row_tile) * 3
    head_store(place, row, rows, label, state, rank, TOP5)


def blocks(classes: int, given: bool) -> triton.Config:
    """Returns the configuration: all classes in a tile where registers hold them, else 128."""
    if given:
        columns = min(1024, triton.next_power_of_2(max(16, classes)))
        tile = {"BLOCK_M": max(1, 4096 // columns), "BLOCK_N": columns}  # 32 logits a thread
        return triton.Config(tile, num_warps=4, num_stages=2)
    columns = min(128, triton.next_power_of_2(max(32, classes)))
    # four warps spill on sm_80
    return triton.Config({"BLOCK_M": 64, "BLOCK_N": columns}, num_warps=8, num_stages=3)


def in_one_tile(
    config: triton.Config, classes: int, given: bool, top5: bool, device: torch.device
) -> bool:
    """Whether the logits are made once, in a single tile.

    Otherwise they are made tile by tile, and once more for top-5 errors. For a product one tile
    pays with top-5 errors alone, and does not compile for Blackwell (Triton 3.7).
    """
    if classes > config.kwargs["BLOCK_N"]:
        return False
    return given or (top5 and not blackwell(device))


def _sums(
    x: Samples, layer: PathLayer | None, targets: Tensor, top5: bool, options: Options
) -> Tensor:
    """Launches the kernel and returns the sums, float64 [T, 3]; without a layer x holds logits."""
    rows, classes, points = x.shape[0], x.shape[1], 1 if x.points is None else x.points
    if layer is not None:
        classes, points = layer.weight.shape[0], layer.weight.points
    if points == 0 or rows == 0:
        return torch.zeros((points, 3), dtype=torch.float64, device=x.values.device)
    config = blocks(classes, layer is None)
    row_tiles = triton.cdiv(rows, config.kwargs["BLOCK_M"])
    sums = torch.empty((points, row_tiles, 3), dtype=torch.float64, device=x.values.device)
    x = aligned(x)
    common: dict[str, Any] = {"targets": targets, "units": classes, "TOP5": top5}
    common |= {"row_tiles": row_tiles, "group_rows": rows_of_a_group(x), "GIVEN": layer is None}
    common |= {"input_slope": options.input_slope, "INPUT_ACTIVATION": options.input_activation}
    common |= {"PRECISION": dot_precision(options.precision), "BLOCK_K": BLOCK_K}
    common["ONE_TILE"] = in_one_tile(config, classes, layer is None, top5, x.values.device)
    common |= config.all_kwargs()

    def run(part: slice, weights: dict[str, Any]) -> None:
        count = part.stop - part.start
        launch(
            cross_entropy_kernel,
            count * row_tiles,
            sums,
            **samples_arguments(x, part.start),
            **weights,
            sums=sums[part],
            points=count,
            **common,
        )

    everything = slice(0, points)
    if layer is None:
        run(everything, _no_layer(x.values))
    elif blends_in_prologue(row_tiles, len(layer.weight.tensors)):
        run(everything, blended_arguments(layer.weight) | bias_arguments(layer.bias, layer.weight))
    else:
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        per_point = padded(layer.weight.shape.numel()) * dtype.itemsize
        for part in chunks(points, per_point, MATERIALIZED_BYTES):
            weights = materialized_arguments(materialized(layer.weight, part, dtype))
            run(part, weights | bias_arguments(layer.bias, layer.weight, part.start))
    return sums.sum(1)


def _no_layer(any_tensor: Tensor) -> dict[str, Any]:
    """Returns arguments for the weight and bias of no layer; any pointer will do."""
    pointers = ("w", "w_coefficients", "bias", "bias_coefficients")
    numbers = ("w_stride", "w_unit", "w_depth", "b_term", "b_unit", "W_TERMS", "B_TERMS")
    return dict.fromkeys(pointers, any_tensor) | dict.fromkeys(numbers, 0)


class _PathCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weights: Tensor | None,
        biases: Tensor | None,
        x: Samples,
        layer: PathLayer | None,
        targets: Tensor,
        top5_and_options: tuple[bool, Options],
    ) -> Tensor:
        top5, options = top5_and_options
        ctx.inputs = (x, [] if layer is None else [layer], targets, options)
        ctx.save_for_backward(values, weights, biases)
        return _sums(x, layer, targets, top5, options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors  # raises if something was changed in place
        x, layers, targets, options = ctx.inputs
        of_x, of_tensors = chain_gradients(
            x, layers, targets, grad[:, 0], options, ctx.needs_input_grad[0]
        )
        of_weight, of_bias = [*of_tensors, None, None][:2]
        return of_x, of_weight, of_bias, None, None, None, None


def path_cross_entropy(
    x: Tensor | Blended,
    weight: Blended | None,
    bias: Blended | None,
    targets: Tensor,
    *,
    input_activation: str = "identity",
    input_slope: float = 0.01,
    top5: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Sums cross-entropy, errors and top-5 errors over the samples at T points.

    The loss is differentiable in x and in the weight's and bias's tensors.

    Args:
        x: the last layer's input [N, in], [T, N, in], or a `Blended` of [J, N, in] of which
            `input_activation` is taken; with weight=None the logits [N, classes] (one point), [T,
            N, classes] or a `Blended` of [J, N, classes].
        weight, bias: [K, classes, in] and [K, classes] with their coefficients [T, K]; the bias may
            be None.
        targets: integers [N], each a class; another label gives a loss of NaN.
        input_slope: of leaky_relu as `input_activation`.
        top5: whether to count top-5 errors; else their column is 0.
        precision: "float32", "tf32" or "bf16" (operands of the products; sums are float32).

    Returns:
        Float64 [T, 3]; gradients of its first column go to x and to the weight's and bias's
            tensors.

    Raises:
        ModeconnError: shapes, dtypes, devices or names that do not fit.
    """
    samples = samples_of("x", x, 2, input_activation)
    targets = check_targets(targets, samples.shape[0])
    options = Options(
        input_activation=input_activation, input_slope=input_slope, precision=precision
    )
    dot_precision(precision)
    if weight is None:
        if bias is not None:
            raise ModeconnError(
                "bias is given and weight is None: x holds the logits already, which take no bias"
            )
        layer = None
        classes, tensors = samples.shape[1], (None, None)
    else:
        layer = check_layer("", PathLayer(weight, bias), samples.shape[1], weight)
        check_points(samples, layer.weight)
        classes = layer.weight.shape[0]
        tensors = (layer.weight.tensors, None if layer.bias is None else layer.bias.tensors)
    if classes == 0:
        raise ModeconnError("there are 0 classes: expected at least one")
    check_same_device(x=samples.values, targets=targets, weight=tensors[0], bias=tensors[1])
    return _PathCrossEntropy.apply(
        samples.values, *tensors, samples, layer, targets, (top5, options)
    )


def path_cross_entropy_reference(
    x: Tensor | Blended,
    weight: Blended | None,
    bias: Blended | None,
    targets: Tensor,
    *,
    input_activation: str = "identity",
    input_slope: float = 0.01,
    top5: bool = False,
) -> Tensor:
    """Computes `path_cross_entropy` in plain PyTorch, in any dtype and differentiable."""
    if weight is not None:
        z = path_linear_reference(
            x, weight, bias, input_activation=input_activation, input_slope=input_slope
        )
    elif isinstance(x, Blended):
        z = act(x.materialized(), input_activation, input_slope)
    else:
        z = x if x.dim() == 3 else x[None]
    return head_reference(z, targets, top5)
