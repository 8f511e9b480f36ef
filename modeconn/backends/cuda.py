"""CUDA backend: chains of linear layers up to 256 wide, fused with the loss in one CUDA C++ kernel.

Each segment is looked at once. If what it does per point is such a chain, or adds up a combination
of outputs, the kernel of csrc/cuda runs it, in chunks of points whose packed weights fit a
workspace. Any other segment is left to the reference backend on the device, which also computes the
shared values.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.activations import IDENTITY, Activation, mismatch
from modeconn.backends.base import Request, Sums, Tick, Values, attempt
from modeconn.backends.native.layers import Layer, StepGraph
from modeconn.backends.native.partition import straight_steps
from modeconn.backends.reference import ReferenceBackend
from modeconn.errors import ModeconnError, Unsupported
from modeconn.metrics import Head
from modeconn.plan.program import Blend, Moving, Program, Segment, SharedStep, Term, VaryingStep
from modeconn.plan.units import static

# Bytes of packed weights and partial sums of one launch; the points go in chunks that fit, of one
# at least.
_WORKSPACE = 256 << 20
_SUMS = Sums(losses=("cross_entropy",), columns={"loss": 0, "error": 1, "top5_error": 2})
# setup.py writes it where it could not build
_MISSING_NOTE = Path(__file__).parent.parent / "_cuda_missing.txt"


@functools.cache
def extension() -> Any:
    """The CUDA extension.

    Raises:
        Unsupported: it is not built, does not load, or is of another version.
    """
    try:
        module = importlib.import_module("modeconn._cuda")
    except ModuleNotFoundError:
        note = "it has not been built"
        if _MISSING_NOTE.exists():
            note = _MISSING_NOTE.read_text(encoding="utf-8").strip()
        raise Unsupported(f"the extension modeconn._cuda is not available: {note}") from None
    except ImportError as error:
        raise Unsupported(
            f"the extension modeconn._cuda was built but does not load: {error}"
        ) from None
    problem = mismatch(module, "cuda")
    if problem:
        raise Unsupported(f"the extension modeconn._cuda is not available: {problem}")
    return module


@dataclass(frozen=True, eq=False)
class CudaLayer:
    """y = activation(scale(t) (W(t) x + b(t)) + shift(t)) at T points, W(t) = Σ_k c_k(t) W_k.

    Attributes:
        weights, biases: float32 [K, units, depth] and [K', units]; K' may be 0.
        coefficients, bias_coefficients: float64 [T, K] and [T, K'].
        scale, shift: float64 [T, units], both or none.
    """

    weights: Tensor
    coefficients: Tensor
    biases: Tensor
    bias_coefficients: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: Activation = IDENTITY


def mlp_sums(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    layers: Sequence[CudaLayer],
    labels: Tensor,
    *,
    activation: Activation = IDENTITY,
    top5: bool = False,
    precision: str = "float32",
    variant: str = "auto",
) -> Tensor:
    """Sums of loss, error and top-5 error over the rows at T points, float64 [T, 3].

    Nothing waits for the device.

    Args:
        terms: J float32 tensors [N, width], contiguous, on one device; x(t) = activation(Σ_j
            coefficients[t, j] terms[j]).
        coefficients: float64 [T, J], on that device, as everything else.
        layers: none or more, all widths at most 256.
        labels: int64 [N], each in [0, classes): not checked, since that would wait for the device.
        precision: "float32" (three tf32 products each), "tf32" or "bf16" (of the operands).
        variant: "mma", "wgmma" (on compute capability 9.0, and not for float32), or "auto".

    Raises:
        ModeconnError: shapes, dtypes, devices or widths that do not fit.
        RuntimeError: CUDA failed.
    """
    points = len(coefficients)
    device = terms[0].device if terms else coefficients.device
    rows, width = _check_arguments(terms, coefficients, layers, labels, device)
    sums = torch.zeros(points, 3, dtype=torch.float64, device=device)

    def chain(start: int, stop: int) -> Any:
        try:
            return extension().Chain(
                rows=rows,
                points=stop - start,
                width=width,
                terms=[term.data_ptr() for term in terms],
                coefficients=coefficients[start:stop].data_ptr(),
                layers=[_described(layer, start, stop) for layer in layers],
                labels=labels.data_ptr(),
                activation=activation.name,
                slope=activation.slope,
                top5=top5,
                precision=precision,
                variant=variant,
                device=device.index or 0,
            )
        except ValueError as error:
            raise ModeconnError(str(error)) from None

    bytes_per_point = max(1, chain(0, min(1, points)).workspace_bytes)
    together = max(1, min(points, _WORKSPACE // bytes_per_point))
    for start in range(0, points, together):
        _launch(chain(start, min(start + together, points)), sums[start:])
    return sums


def _launch(chain: Any, sums: Tensor) -> None:
    """Runs a chain of the extension on the current stream, with a workspace of its own."""
    device, size = sums.device, chain.workspace_bytes
    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    memory = torch.empty(size + 128, dtype=torch.uint8, device=device)
    address = -(-memory.data_ptr() // 128) * 128
    chain.mlp_sums(workspace=address, workspace_bytes=size, sums=sums.data_ptr(), stream=stream)


def _check_arguments(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    layers: Sequence[CudaLayer],
    labels: Tensor,
    device: torch.device,
) -> tuple[int, ...]:
    """Checks all tensors; the shape of a term."""
    rows, width = _shape(terms[0], "terms[0]", 2) if terms else (0, 0)
    points = len(coefficients)
    check = functools.partial(_check, device=device)
    for j, term in enumerate(terms):
        check(term, f"terms[{j}]", torch.float32, (rows, width))
    check(coefficients, "coefficients", torch.float64, (points, len(terms)))
    check(labels, "labels", torch.int64, (rows,))
    depth = width
    for index, layer in enumerate(layers):
        depth = _check_layer(layer, f"layers[{index}]", points, depth, check)
    return rows, width


def _shape(tensor: Tensor, what: str, dims: int) -> tuple[int, ...]:
    if tensor.dim() != dims:
        raise ModeconnError(f"{what} has shape {list(tensor.shape)}: expected {dims} dimensions")
    return tuple(tensor.shape)


def _check(
    tensor: Tensor, what: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    fits = (tensor.dtype, tuple(tensor.shape), tensor.device) == (dtype, shape, device)
    if not fits or not tensor.is_contiguous():
        raise ModeconnError(
            f"{what} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} "
            f"on {tensor.device}: expected {dtype} {list(shape)}, contiguous, on {device}"
        )


def _check_layer(
    layer: CudaLayer, what: str, points: int, depth: int, check: Callable[..., None]
) -> int:
    """Checks a layer's tensors; its units."""
    count, units, _ = _shape(layer.weights, f"{what}.weights", 3)
    biases = len(layer.biases)
    check(layer.weights, f"{what}.weights", torch.float32, (count, units, depth))
    check(layer.coefficients, f"{what}.coefficients", torch.float64, (points, count))
    check(layer.biases, f"{what}.biases", torch.float32, (biases, units))
    check(layer.bias_coefficients, f"{what}.bias_coefficients", torch.float64, (points, biases))
    for name, tensor in (("scale", layer.scale), ("shift", layer.shift)):
        if tensor is not None:
            check(tensor, f"{what}.{name}", torch.float64, (points, units))
    return units


def _described(layer: CudaLayer, start: int, stop: int) -> dict[str, Any]:
    """A layer in numbers and addresses, for some of the points."""

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor[start:stop].data_ptr()

    return {
        "weights": (layer.weights.data_ptr(), len(layer.weights), address(layer.coefficients)),
        "biases": (layer.biases.data_ptr(), len(layer.biases), address(layer.bias_coefficients)),
        "units": layer.weights.shape[1],
        "depth": layer.weights.shape[2],
        "scale": address(layer.scale),
        "shift": address(layer.shift),
        "activation": layer.activation.name,
        "slope": layer.activation.slope,
    }


@dataclass(frozen=True, eq=False)
class KernelChain:
    """A segment as the kernel takes it."""

    terms: tuple[Term, ...]
    coefficients: Tensor
    activation: Activation
    layers: list[CudaLayer]
    constant: bool


class CudaBackend(ReferenceBackend):
    """Runs chains of linear layers in the CUDA kernel, all else as the reference backend does."""

    name = "cuda"

    def __init__(self, request: Request) -> None:
        program, device = request.program, request.device
        host = replace(program, shared=[_on_host(step) for step in program.shared])
        self._chains: dict[int, KernelChain] = {}
        reasons = []
        for segment in program.segments:
            found = attempt(functools.partial(_lower, host, segment, device))
            if isinstance(found, Unsupported):
                reasons.append(found)
            else:
                self._chains[segment.index] = found
        if not self._chains:
            raise reasons[0]
        kept: set[int] = set()
        for chain in self._chains.values():
            kept.update(term.value for term in chain.terms)
        super().__init__(program, request.dtype, device, kept=kept)
        self._precision = request.precision

    @classmethod
    def supports(cls, request: Request) -> None:
        """Checks that the extension loads, and that its kernel is for the device and the dtype."""
        engine = extension()
        if request.device.type != ("cpu" if engine.emulated else "cuda"):
            count, problem = engine.device_count()
            there = f"there are {count} CUDA devices"
            if not count:
                there = f"there is no CUDA device ({problem})"
            raise Unsupported(
                f"it computes on a CUDA device, and the device is {request.device}; {there}"
            )
        if request.dtype != torch.float32:
            dtype = str(request.dtype).removeprefix("torch.")
            raise Unsupported(f"it computes in float32, and the precision is {dtype}")

    @classmethod
    def create(cls, request: Request) -> CudaBackend:
        """Makes the backend, if some segment is such a chain."""
        return cls(request)

    def sums(
        self, segment: Segment, values: Values, targets: Tensor, head: Head, tick: Tick
    ) -> Tensor:
        chain = self._chains.get(segment.index)
        if chain is None or not _SUMS.cover(head) or chain.constant:
            return super().sums(segment, values, targets, head, tick)
        part = mlp_sums(
            [values[term.value].contiguous() for term in chain.terms],
            chain.coefficients,
            chain.layers,
            targets.contiguous(),
            activation=chain.activation,
            top5="top5_error" in head.names,
            precision=self._precision,
        )
        tick(len(part))
        return part[:, _SUMS.of(head)]


def _lower(program: Program, segment: Segment, device: torch.device) -> KernelChain:
    """The segment as the kernel takes it.

    Args:
        program: with its weights on the CPU.
        device: of the kernel.

    Raises:
        Unsupported: it is no chain of linear layers, or too wide or deep.
    """
    steps = straight_steps(
        program, replace(segment, steps=[_on_host(step) for step in segment.steps]), "cuda"
    )
    other = next((layer.op for layer in steps.layers if layer.op != "linear"), None)
    if other:
        raise Unsupported(f"{other} is not a linear layer: its kernel runs chains of those alone")
    _check_sizes(program, steps)
    to_device = functools.partial(_to_device, device=device)
    columns = np.stack([term.coefficients for term in steps.terms], axis=1)
    points = len(segment.point_indices)
    return KernelChain(
        steps.terms,
        to_device(columns),
        steps.activation,
        [_cuda_layer(layer, points, to_device) for layer in steps.layers],
        steps.constant,
    )


def _check_sizes(program: Program, steps: StepGraph) -> None:
    """Raises Unsupported for a chain past the kernel's limits."""
    engine = extension()
    output = program.graph.tensor_output
    assert output is not None  # straight_steps has looked
    widths = [static(program.graph.nodes[output].shape[1])]
    for layer in steps.layers:
        widths += layer.weights[0].shape
    for what, value, most in (
        ("width", max(widths), engine.max_width),
        ("number of layers", len(steps.layers), engine.max_layers),
        ("number of combined values", len(steps.terms), engine.max_terms),
    ):
        if value > most:
            raise Unsupported(f"its {what} is {value}: expected at most {most}")


def _cuda_layer(layer: Layer, points: int, to_device: Callable[..., Tensor]) -> CudaLayer:
    units = layer.weights[0].shape[0]
    biases = np.stack(layer.biases) if layer.biases else np.zeros((0, units))
    bias_coefficients = layer.bias_coefficients
    if bias_coefficients is None:
        bias_coefficients = np.zeros((points, 0))
    scale, shift = None, None
    if layer.norm is not None:
        scale, shift = (to_device(np.broadcast_to(v, (points, units))) for v in layer.norm)
    return CudaLayer(
        weights=to_device(np.stack(layer.weights), dtype=torch.float32),
        coefficients=to_device(np.asarray(layer.coefficients)),
        biases=to_device(biases, dtype=torch.float32),
        bias_coefficients=to_device(bias_coefficients),
        scale=scale,
        shift=shift,
        activation=layer.activation,
    )


def _to_device(
    array: np.ndarray, device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    return torch.from_numpy(np.array(array)).to(device, dtype)


Step = TypeVar("Step", bound="SharedStep | VaryingStep")


def _on_host(step: Step) -> Step:
    """A step with its weights on the CPU, where `straight_steps` reads them."""
    return replace(step, entries=tuple(_entry_on_host(entry) for entry in step.entries))  # type: ignore[misc]


def _entry_on_host(entry: Tensor | Moving) -> Tensor | Moving:
    if isinstance(entry, Tensor):
        return entry.cpu()
    if isinstance(entry, Blend):
        return replace(entry, tensors=tuple(tensor.cpu() for tensor in entry.tensors))
    return replace(entry, table=entry.table.cpu())
