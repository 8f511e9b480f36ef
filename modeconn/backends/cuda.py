"""The cuda backend: chains of linear layers of width 256 at most, fused down to their sums in one CUDA C++ kernel.

Each segment is looked at once. If what it does per point is such a chain, or adds up a combination
of outputs, the kernel of csrc/cuda runs it, in chunks of points whose packed weights fit a
workspace. Any other segment is left to the reference backend on the device, which also computes the
shared values.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.native.partition import find_chain
from modeconn.backends.reference import ReferenceBackend, Values
from modeconn.errors import CannotRun, ModeconnError
from modeconn.metrics import Head
from modeconn.plan.program import Blend, Moving, Program, Segment, SharedStep, Term, VaryingStep
from modeconn.plan.units import static

# Bytes of packed weights and partial sums of one launch.
_WORKSPACE = 256 << 20
# The kernel's sums, by the names that a head has for them.
_SUMS = {"loss": 0, "error": 1, "top5_error": 2}
# setup.py writes it where it could not build
_MISSING_NOTE = Path(__file__).parent.parent / "_cuda_missing.txt"


@functools.cache
def extension() -> Any:
    """The CUDA extension.

    Raises:
        CannotRun: it is not built or does not load.
    """
    try:
        return importlib.import_module("modeconn._cuda")
    except ModuleNotFoundError:
        note = (
            _MISSING_NOTE.read_text(encoding="utf-8").strip()
            if _MISSING_NOTE.exists()
            else "it has not been built"
        )
        raise CannotRun("cuda", f"the extension modeconn._cuda is not available: {note}") from None
    except ImportError as error:
        raise CannotRun(
            "cuda", f"the extension modeconn._cuda was built but does not load: {error}"
        ) from None


@dataclass(frozen=True, eq=False)
class CudaLayer:
    """y = act(scale(t) (W(t) x + b(t)) + shift(t)), W(t) = Σ_k coefficients[t, k] weights[k], and b(t) likewise.

    Attributes:
        weights, biases: float32 [K, units, depth] and [K', units]; K' may be 0.
        coefficients, bias_coefficients: float64 [T, K] and [T, K'].
        scale, shift: float64 [T, units], both or none.
        activation, slope: as in the C++ engine.
    """

    weights: Tensor
    coefficients: Tensor
    biases: Tensor
    bias_coefficients: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "identity"
    slope: float = 0.01


def mlp_sums(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    layers: Sequence[CudaLayer],
    labels: Tensor,
    *,
    activation: str = "identity",
    slope: float = 0.01,
    top5: bool = False,
    precision: str = "float32",
    variant: str = "auto",
    workspace: int = _WORKSPACE,
) -> Tensor:
    """Sums over the rows of loss, error and top-5 error of a chain at T points; nothing waits for the device.

    Args:
        terms: J float32 tensors [N, width], contiguous, on one device; x(t) = activation(Σ_j
            coefficients[t, j] terms[j]).
        coefficients: float64 [T, J], on that device, as everything else.
        layers: none or more, all widths at most 256.
        labels: int64 [N], each in [0, classes): not checked, since that would wait for the device.
        precision: "float32" (three tf32 products each), "tf32" or "bf16" (of the operands).
        variant: "mma", "wgmma" (on compute capability 9.0, and not for float32), or "auto".
        workspace: bytes that a launch may take; the points go in chunks that fit, of one at least.

    Returns:
        float64 [T, 3].

    Raises:
        ModeconnError: shapes, dtypes, devices or widths that do not fit.
        RuntimeError: CUDA failed.
    """
    engine = extension()
    rows, width = _shape(terms[0], "terms[0]", 2) if terms else (0, 0)
    points = len(coefficients)
    device = terms[0].device if terms else coefficients.device
    here = functools.partial(_checked, device=device)
    for j, term in enumerate(terms):
        here(term, f"terms[{j}]", torch.float32, (rows, width))
    here(coefficients, "coefficients", torch.float64, (points, len(terms)))
    here(labels, "labels", torch.int64, (rows,))
    depth = width
    for index, layer in enumerate(layers):
        depth = _check_layer(layer, f"layers[{index}]", points, depth, here)
    sums = torch.zeros(points, 3, dtype=torch.float64, device=device)

    def chain(start: int, stop: int) -> Any:
        try:
            return engine.Chain(
                rows=rows,
                points=stop - start,
                width=width,
                terms=[term.data_ptr() for term in terms],
                coefficients=coefficients[start:stop].data_ptr(),
                layers=[_described(layer, start, stop) for layer in layers],
                labels=labels.data_ptr(),
                activation=activation,
                slope=slope,
                top5=top5,
                precision=precision,
                variant=variant,
                device=device.index or 0,
            )
        except ValueError as error:
            raise ModeconnError(str(error)) from None

    stream = 0 if device.type == "cpu" else torch.cuda.current_stream(device).cuda_stream
    together = max(1, min(points, workspace // max(1, chain(0, min(1, points)).workspace_bytes)))
    for start in range(0, points, together):
        part = chain(start, min(start + together, points))
        memory = torch.empty(part.workspace_bytes + 128, dtype=torch.uint8, device=device)
        address = -(-memory.data_ptr() // 128) * 128
        out = sums[start].data_ptr()
        part.mlp_sums(
            workspace=address, workspace_bytes=part.workspace_bytes, sums=out, stream=stream
        )
    return sums


def _shape(tensor: Tensor, what: str, dims: int) -> tuple[int, ...]:
    if tensor.dim() != dims:
        raise ModeconnError(f"{what} has shape {list(tensor.shape)}: expected {dims} dimensions")
    return tuple(tensor.shape)


def _checked(
    tensor: Tensor, what: str, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if (
        tensor.dtype != dtype
        or tuple(tensor.shape) != shape
        or tensor.device != device
        or not tensor.is_contiguous()
    ):
        raise ModeconnError(
            f"{what} is {tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}: expected "
            f"{dtype} {list(shape)}, contiguous, on {device}"
        )


def _check_layer(
    layer: CudaLayer, what: str, points: int, depth: int, here: Callable[..., None]
) -> int:
    """Check a layer's tensors; its units."""
    count, units, _ = _shape(layer.weights, f"{what}.weights", 3)
    here(layer.weights, f"{what}.weights", torch.float32, (count, units, depth))
    here(layer.coefficients, f"{what}.coefficients", torch.float64, (points, count))
    here(layer.biases, f"{what}.biases", torch.float32, (len(layer.biases), units))
    here(
        layer.bias_coefficients,
        f"{what}.bias_coefficients",
        torch.float64,
        (points, len(layer.biases)),
    )
    for name, tensor in (("scale", layer.scale), ("shift", layer.shift)):
        if tensor is not None:
            here(tensor, f"{what}.{name}", torch.float64, (points, units))
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
        "activation": layer.activation,
        "slope": layer.slope,
    }


@dataclass(frozen=True, eq=False)
class Fused:
    """A segment as the kernel takes it."""

    terms: tuple[Term, ...]
    coefficients: Tensor
    activation: str
    slope: float
    layers: list[CudaLayer]
    constant: bool


class CudaBackend(ReferenceBackend):
    """Runs chains of linear layers in the CUDA kernel and everything else as the reference backend does on the device.

    Args:
        program, dtype, device: as for the reference backend.
        precision: "float32", "tf32" or "bf16", of the kernel's products.

    Raises:
        CannotRun: the extension is not built, there is no CUDA device, or no segment is such a
            chain.
    """

    name = "cuda"

    def __init__(
        self, program: Program, dtype: torch.dtype, device: torch.device, precision: str = "float32"
    ) -> None:
        engine = extension()
        if device.type != ("cpu" if engine.emulated else "cuda"):
            count, problem = engine.device_count()
            there = (
                f"there are {count} CUDA devices"
                if count
                else f"there is no CUDA device ({problem})"
            )
            raise CannotRun(
                "cuda", f"it computes on a CUDA device, and the device is {device}; {there}"
            )
        if dtype != torch.float32:
            raise CannotRun(
                "cuda",
                f"it computes in float32, and the precision is {str(dtype).removeprefix('torch.')}",
            )
        super().__init__(program, dtype, device)
        self._precision = precision
        host = replace(program, shared=[_on_host(step) for step in program.shared])
        found = {segment.index: _fused(host, segment, device) for segment in program.segments}
        self._fused = {index: fused for index, fused in found.items() if isinstance(fused, Fused)}
        if not self._fused:
            raise CannotRun("cuda", next(str(reason) for reason in found.values()))
        self._kept |= {term.value for fused in self._fused.values() for term in fused.terms}

    def all_outputs(
        self, segment: Segment, values: Values, rows: int
    ) -> Iterator[tuple[int, slice, Any]]:
        raise CannotRun("cuda", "its kernel gives sums of losses and errors, no outputs")

    def sums(
        self,
        segment: Segment,
        values: Values,
        targets: Tensor,
        head: Head,
        tick: Callable[..., None],
    ) -> Tensor:
        fused = self._fused.get(segment.index)
        if fused is None or not head.builtin or fused.constant:
            return super().sums(segment, values, targets, head, tick)
        part = mlp_sums(
            [values[term.value].contiguous() for term in fused.terms],
            fused.coefficients,
            fused.layers,
            targets.contiguous(),
            activation=fused.activation,
            slope=fused.slope,
            top5="top5_error" in head.names,
            precision=self._precision,
        )
        tick(len(part))
        return part[:, [_SUMS[name] for name in head.names]]


def _fused(program: Program, segment: Segment, device: torch.device) -> Fused | str:
    """The segment as the kernel takes it, or why it does not."""
    engine = extension()
    steps = [_on_host(step) for step in segment.steps]
    chain = find_chain(program, replace(segment, steps=steps))
    if isinstance(chain, str):
        return chain
    other = next((layer.op for layer in chain.layers if layer.op != "linear"), None)
    if other:
        return f"{other} is not a linear layer"
    output = program.graph.tensor_output
    assert output is not None  # find_chain has looked
    widths = [layer.weights[0].shape for layer in chain.layers] or [
        (static(program.graph.nodes[output].shape[1]),)
    ]
    for what, value, most in (
        ("width", max(max(shape) for shape in widths), engine.max_width),
        ("number of layers", len(chain.layers), engine.max_layers),
        ("number of combined values", len(chain.terms), engine.max_terms),
    ):
        if value > most:
            return f"its {what} is {value}: expected at most {most}"

    def tensor(array: np.ndarray, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.from_numpy(np.array(array)).to(device, dtype)

    layers = []
    for layer in chain.layers:
        points = len(segment.point_indices)
        units = layer.weights[0].shape[0]
        scale, shift = layer.norm if layer.norm is not None else (None, None)
        layers.append(
            CudaLayer(
                weights=tensor(np.stack(layer.weights), torch.float32),
                coefficients=tensor(np.asarray(layer.coefficients)),
                biases=tensor(
                    np.stack(layer.biases) if layer.biases else np.zeros((0, units)), torch.float32
                ),
                bias_coefficients=tensor(
                    np.zeros((points, 0))
                    if layer.bias_coefficients is None
                    else layer.bias_coefficients
                ),
                scale=None if scale is None else tensor(np.broadcast_to(scale, (points, units))),
                shift=None if shift is None else tensor(np.broadcast_to(shift, (points, units))),
                activation=layer.activation,
                slope=layer.slope,
            )
        )
    columns = np.stack([term.coefficients for term in chain.terms], axis=1)
    start = chain.start
    return Fused(
        chain.terms, tensor(columns), start.activation, start.slope, layers, chain.constant
    )


Step = TypeVar("Step", bound="SharedStep | VaryingStep")


def _on_host(step: Step) -> Step:
    """A step with its weights on the CPU, where `find_chain` reads them."""
    return replace(step, entries=tuple(_entry_on_host(entry) for entry in step.entries))  # type: ignore[misc]


def _entry_on_host(entry: Tensor | Moving) -> Tensor | Moving:
    if isinstance(entry, Tensor):
        return entry.cpu()
    if isinstance(entry, Blend):
        return replace(entry, tensors=tuple(tensor.cpu() for tensor in entry.tensors))
    return replace(entry, table=entry.table.cpu())
