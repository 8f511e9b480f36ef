"""Table of the activations that the backends' kernels have.

Each row says how an activation is written in a graph, what it is in PyTorch, and which kernels have
it. The order of the rows is that of csrc/activations.h; the extensions are compared with it when
they load. A new activation is a row here, one there, and its body in each kernel that gets it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from modeconn.capture.graph import Node

# PyTorch's default slope of leaky_relu.
_SLOPE = 0.01


@dataclass(frozen=True)
class Activation:
    """An activation as a kernel is told of it.

    Attributes:
        name: in the table.
        slope: of leaky_relu; alpha of elu; without meaning for the others.
    """

    name: str = "identity"
    slope: float = _SLOPE


IDENTITY = Activation()


@dataclass(frozen=True)
class Form:
    """An operation of the graph that is an activation.

    Attributes:
        op: the operation's name.
        fixed: the values that its arguments must have, by their names in the schema.
        slope: the argument that is the activation's slope, if it has one.
    """

    op: str
    fixed: dict[str, Any] = field(default_factory=dict)
    slope: str | None = None

    def read(self, node: Node, name: str) -> Activation | None:
        """The activation that a node is, if it is of this form."""
        if node.op != self.op or any(node[key] != value for key, value in self.fixed.items()):
            return None
        return Activation(name) if self.slope is None else Activation(name, float(node[self.slope]))


@dataclass(frozen=True)
class Row:
    """An activation of the table.

    Attributes:
        name: by which kernels know it.
        function: of a tensor and the slope, in PyTorch.
        forms: the operations that it is; none for the identity.
        backends: those whose kernels have it.
    """

    name: str
    function: Callable[[Tensor, float], Tensor]
    forms: tuple[Form, ...] = ()
    backends: tuple[str, ...] = ("native",)


_ALL = ("native", "triton", "cuda")
# At 20 PyTorch takes softplus for the identity.
_SOFTPLUS = {"beta": 1, "threshold": 20}

TABLE = (
    Row("identity", lambda x, slope: x, (), _ALL),
    Row(
        "relu",
        lambda x, slope: F.relu(x),
        (Form("relu"), Form("clamp_min", {"min": 0}), Form("clamp", {"min": 0, "max": None})),
        _ALL,
    ),
    Row("leaky_relu", F.leaky_relu, (Form("leaky_relu", slope="negative_slope"),), _ALL),
    Row("tanh", lambda x, slope: x.tanh(), (Form("tanh"),), _ALL),
    Row("gelu", lambda x, slope: F.gelu(x), (Form("gelu", {"approximate": "none"}),), _ALL),
    Row(
        "gelu_tanh",
        lambda x, slope: F.gelu(x, approximate="tanh"),
        (Form("gelu", {"approximate": "tanh"}),),
        _ALL,
    ),
    Row("silu", lambda x, slope: F.silu(x), (Form("silu"),), _ALL),
    Row("sigmoid", lambda x, slope: x.sigmoid(), (Form("sigmoid"),), _ALL),
    Row(
        "relu6",
        lambda x, slope: F.relu6(x),
        (
            Form("relu6"),
            Form("hardtanh", {"min_val": 0, "max_val": 6}),
            Form("clamp", {"min": 0, "max": 6}),
        ),
    ),
    Row("hardsigmoid", lambda x, slope: F.hardsigmoid(x), (Form("hardsigmoid"),)),
    Row("hardswish", lambda x, slope: F.hardswish(x), (Form("hardswish"),)),
    Row("elu", F.elu, (Form("elu", {"scale": 1, "input_scale": 1}, slope="alpha"),)),
    Row("selu", lambda x, slope: F.selu(x), (Form("selu"),)),
    Row("softplus", lambda x, slope: F.softplus(x), (Form("softplus", _SOFTPLUS),)),
    Row("mish", lambda x, slope: F.mish(x), (Form("mish"),)),
    Row("log_sigmoid", lambda x, slope: F.logsigmoid(x), (Form("log_sigmoid"),)),
)

_BY_OP: dict[str, list[tuple[Row, Form]]] = {}
for _row in TABLE:
    for _form in _row.forms:
        _BY_OP.setdefault(_form.op, []).append((_row, _form))
# Names of the operations that are activations, as they are called or otherwise.
OPERATIONS = frozenset(_BY_OP)


def names_of(backend: str) -> list[str]:
    """The activations that a backend's kernels have, in order."""
    return [row.name for row in TABLE if backend in row.backends]


def mismatch(extension: Any, backend: str) -> str:
    """Why an extension's table of activations is another than this one; "" where they are equal.

    Kernels get an activation by its place in the table, so that of another version would compute
    another function.
    """
    built = list(extension.activations()) if hasattr(extension, "activations") else []
    expected = names_of(backend)
    if built == expected:
        return ""
    return (
        f"it was built from another version, with activations {', '.join(built) or 'unknown'}: "
        f"expected {', '.join(expected)}; `pip install -e .` in a checkout builds it anew"
    )


def activation_of(node: Node, backend: str) -> Activation | None:
    """The activation that a node is, if the backend's kernels have it."""
    for row, form in _BY_OP.get(node.op, ()):
        found = form.read(node, row.name) if backend in row.backends else None
        if found is not None:
            return found
    return None
