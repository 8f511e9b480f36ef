"""Plans and lowered programs as text; tensors are numbered by content, on every machine alike."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modeconn.backends.base import attempt
from modeconn.backends.native.layers import Layer
from modeconn.backends.native.partition import subgraphs, whole_subgraph
from modeconn.capture.graph import Entry, In, Size
from modeconn.capture.ops import Take
from modeconn.errors import Unsupported
from modeconn.plan.program import Blend, Combination, PerPoint, Program, Varying
from modeconn.plan.units import Units


class Names:
    """Short names for arrays, one for each content, in the order in which they are met."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], str] = {}

    def of(self, array: Tensor | np.ndarray) -> str:
        values = array.detach().cpu().contiguous().numpy() if isinstance(array, Tensor) else array
        key = values.shape, str(values.dtype), np.ascontiguousarray(values).tobytes()
        shape = "x".join(map(str, values.shape))
        return self._known.setdefault(key, f"#{len(self._known)}[{shape}]")


def plan_text(program: Program, names: Names) -> Iterator[str]:
    """What is done once, and what for each point of each segment."""
    for number in program.order:
        step = program.shared[number]
        entries = ", ".join(map(names.of, step.entries))
        yield (
            f"v{number} = {_called(step.node, [f'v{i}' for i in step.inputs])}"
            f" weights({entries}){_units(step.units)} {step.flops:.6g} flops"
        )
    for segment in program.segments:
        points, active = segment.point_indices.tolist(), list(segment.active)
        yield f"segment {segment.index}: points {points} active {active}"
        for index, step in enumerate(segment.steps):
            entries = ", ".join(_entry(entry, names) for entry in step.entries)
            inputs = [f"s{i}" if isinstance(i, int) else _sum(i) for i in step.inputs]
            what = (
                f"sum {_sum(step.combine)}"
                if step.combine is not None
                else _called(step.node, inputs)
            )
            units = _units(step.units)
            yield f"  s{index} = {what} weights({entries}){units} {step.flops:.6g} flops"
        for node, form in segment.outputs.items():
            yield f"  output {node}: {f's{form.step}' if isinstance(form, Varying) else _sum(form)}"


def lowered_text(program: Program, names: Names) -> Iterator[str]:
    """What the C++ engine runs of each segment."""
    for segment in program.segments:
        whole = attempt(functools.partial(whole_subgraph, program, segment))
        found = subgraphs(program, segment) if isinstance(whole, Unsupported) else [whole]
        for subgraph in found:
            steps = subgraph.steps
            terms = [f"v{term.value}*{_values(term.coefficients)}" for term in steps.terms]
            yield (
                f"segment {segment.index}: steps {subgraph.first} to {subgraph.last}"
                f" from {terms or steps.step}"
            )
            yield f"  {steps.activation.name} {steps.activation.slope:g}"
            for number, layer in enumerate(steps.layers):
                yield f"  {number}: {_layer(layer, names)}"


def _layer(layer: Layer, names: Names) -> str:
    weights, biases = (" ".join(map(names.of, arrays)) for arrays in (layer.weights, layer.biases))
    columns = "" if layer.coefficients is None else _values(layer.coefficients)
    norm = "" if layer.norm is None else f" norm{[list(part.shape) for part in layer.norm]}"
    terms = [f"v{term.value}*{_values(term.coefficients)}" for term in layer.terms]
    return (
        f"{layer.op} {layer.geometry} reads {layer.reads} adds {layer.adds}"
        f" inputs {list(layer.inputs)} terms {terms}"
        f" step {layer.step} weights({weights}) {columns} biases({biases}){norm}"
        f" {layer.activation.name} {layer.activation.slope:g}"
    )


def _called(node: Any, inputs: Sequence[str]) -> str:
    given = [f"{name}={_leaf(leaf, inputs)}" for name, leaf in node.arguments.items()]
    function = (
        f" { ({a: i.tolist() for a, i in node.function.along.items()}) }"
        if isinstance(node.function, Take)
        else ""
    )
    return f"{node.op}{function}({', '.join(given)}) -> [{', '.join(map(str, node.shape))}]"


def _leaf(leaf: Any, inputs: Sequence[str]) -> str:
    if isinstance(leaf, In):
        return inputs[leaf.index]
    if isinstance(leaf, Entry):
        return f"w{leaf.index}"
    if isinstance(leaf, Size):
        return str(leaf)
    if isinstance(leaf, (list, tuple)):
        return f"[{', '.join(_leaf(each, inputs) for each in leaf)}]"
    return str(leaf)


def _entry(entry: Any, names: Names) -> str:
    if isinstance(entry, Blend):
        return " + ".join(
            f"{_values(c)}*{names.of(t)}" for c, t in zip(entry.coefficients, entry.tensors)
        )
    return f"table {names.of(entry.table)}" if isinstance(entry, PerPoint) else names.of(entry)


def _sum(form: Combination) -> str:
    return " + ".join(f"{_values(term.coefficients)}*v{term.value}" for term in form.terms)


def _units(units: Units) -> str:
    return (
        f" units { ({axis: index.tolist() for axis, index in units.along.items()}) }"
        if units
        else ""
    )


def _values(column: np.ndarray) -> str:
    text = np.array2string(np.round(column, 4) + 0.0, separator=" ", max_line_width=10**6)
    return "1" if bool((column == 1).all()) else "".join(text.split("\n"))


def bits(values: Any) -> list[str]:
    """The numbers of tensors or arrays, exactly."""
    flat = [torch.as_tensor(each).detach().double().reshape(-1).tolist() for each in values]
    return [number.hex() for each in flat for number in each]
