"""Networks of common layers as graphs, without torch.export, which takes seconds to load.

A network runs once on a few rows, and every function of PyTorch's that it calls is written down.
Those known here work row by row: the first axis of each value is the rows, and nothing else depends
on their number. Any other call, a read of a value's shape among them, ends the record, and
torch.export takes over. Both give one graph (tests/test_direct.py).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from modeconn.capture import ops
from modeconn.capture.graph import Dim, Entry, Graph, In, Node, Size
from modeconn.capture.normalize import normalize
from modeconn.capture.signature import named

_ATEN = torch.ops.aten
_TORCH = str(Path(torch.__file__).parent)
# An operation with its arguments as torch.export has them.
Form = tuple[Callable[..., Any], Sequence[Any]]


class _Unknown(Exception):
    """Something was done that is not known here."""


def direct_graph(model: nn.Module, x: Any) -> Graph | None:
    """Return a network's graph; None where it does what is not known here.

    Args:
        model: a copy in eval mode; it is run once.
        x: rows of input, [N, …].
    """
    if type(x) is not Tensor or x.dim() < 2:
        return None
    state = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if len(names) < len(state):  # tied, or no tensor
        return None
    x = x.clone()  # a network may write to its input
    recorder = _Recorder(model, x, names)
    try:
        with torch.no_grad(), _uncompiled(), recorder:
            output = model(x)
    except Exception:  # the network's own forward, with functions that raise in its way
        return None
    return None if recorder.failed else recorder.graph(output)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Within, functions that torch.compile has made run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and loading it takes seconds
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


class _Recorder(TorchFunctionMode):
    """Writes down the functions that are called within.

    Args:
        model: that calls them.
        x: its input.
        names: of its parameters and buffers, by their ids.

    Attributes:
        failed: whether something was called that is not known; a network may have caught that.
    """

    def __init__(self, model: nn.Module, x: Tensor, names: Mapping[int, str]) -> None:
        super().__init__()
        self.failed = False
        self._x, self._names = x, names
        self._parts = {id(part): name for name, part in model.named_modules()}
        self._kept = [x]  # alive, so that no other tensor has the id of one of them
        self._ids = {id(x): 0}
        shape = self._shape(x)
        self._nodes = [Node(0, "input", ops.placeholder, {}, shape=shape, source="input")]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function, and write it down."""
        given = dict(kwargs or {})
        if func in _ASKED:
            return func(*args, **given)
        try:
            if self.failed or func not in _FORMS:
                raise _Unknown
            function, arguments = _FORMS[func](*args, **given)
            subject = arguments[0]
            value = func(*args, **given)
            self._check(value, subject, written=function is not _ATEN.alias.default)
            self._add(function, named(function, arguments), value)
        except BaseException:
            self.failed = True
            raise
        return value

    def graph(self, output: Any) -> Graph | None:
        """Return the graph of what was written down; None where the output is nothing of it."""
        if id(output) not in self._ids:
            return None
        last = self._ids[id(output)]
        read = {last}.union(*(node.inputs for node in self._nodes))
        if len(read) < len(self._nodes):  # something that nothing reads
            return None
        return Graph(tuple(self._nodes), In(last), {})

    def _check(self, value: Any, subject: Any, written: bool) -> None:
        """Raise where a value is not of the rows alone, or other values changed with it.

        Args:
            value: that a function returned.
            subject: its first argument.
            written: whether it would be the subject only if that was written to.
        """
        x = self._x
        known = type(value) is Tensor and (value.dtype, value.device) == (x.dtype, x.device)
        if not known or value.dim() < 2 or len(value) != len(x) or id(subject) not in self._ids:
            raise _Unknown
        shares = [each for each in self._kept if _share(each, value)]
        if written and value is subject and len(shares) > 1:
            raise _Unknown  # a view of it has changed, too

    def _add(self, function: Callable[..., Any], given: dict[str, Any], value: Tensor) -> None:
        inputs: list[int] = []
        entries: list[str] = []
        arguments = {name: self._template(each, inputs, entries) for name, each in given.items()}
        shape = self._shape(value)
        call = normalize(function, arguments, self._nodes, tuple(inputs), shape)
        if all(each is not value for each in self._kept):
            self._kept.append(value)
        if call.op in ("alias", "dropout"):
            self._ids[id(value)] = call.inputs[0]
            return
        self._ids[id(value)] = number = len(self._nodes)
        self._nodes.append(
            Node(
                number,
                call.op,
                call.function,
                call.arguments,
                call.inputs,
                tuple(entries),
                shape,
                self._source(),
            )
        )

    def _template(self, item: Any, inputs: list[int], entries: list[str]) -> Any:
        if isinstance(item, (list, tuple)):
            return [self._template(part, inputs, entries) for part in item]
        if not isinstance(item, Tensor):
            return item
        if id(item) in self._ids:
            inputs.append(self._ids[id(item)])
            return In(len(inputs) - 1)
        if id(item) not in self._names:
            raise _Unknown
        entries.append(self._names[id(item)])
        return Entry(len(entries) - 1)

    def _shape(self, value: Tensor) -> tuple[Dim, ...]:
        return (Size(lambda rows: rows, "N"), *value.shape[1:])

    def _source(self) -> str:
        """The innermost module's path, and the line of the user's code that is called from."""
        path, where, frame = "", "", sys._getframe(1)
        call = nn.Module._call_impl.__code__
        while frame.f_back is not None and frame.f_code is not direct_graph.__code__:
            code = frame.f_code
            if code is call:
                path = path or self._parts.get(id(frame.f_locals["self"]), "")
            elif not where and code.co_filename != __file__:
                user = not code.co_filename.startswith(_TORCH)
                where = f"{Path(code.co_filename).name}:{frame.f_lineno}" if user else ""
            frame = frame.f_back
        return f"{path} {where}".strip()


def _share(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


# -- what is known ---------------------------------------------------------------------------------

# Reads that do not depend on the number of rows.
_ASKED = {
    Tensor.dim,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("ndim", "dtype", "device", "is_cuda", "requires_grad", "layout")
    ),
}


def _require(holds: bool) -> None:
    if not holds:
        raise _Unknown


def _of(value: Any, count: int) -> list[int]:
    """A number for each axis of an image."""
    numbers = [value] * count if isinstance(value, int) else list(value)
    _require(len(numbers) == count and all(type(number) is int for number in numbers))
    return numbers


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Form:  # noqa: A002
    return _ATEN.linear.default, (input, weight, bias)


def _convolution(axes: int, function: Callable[..., Any]) -> Callable[..., Form]:
    def form(
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Form:
        _require(input.dim() == axes + 2 and not isinstance(padding, str))
        sizes = [_of(value, axes) for value in (stride, padding, dilation)]
        return function, (input, weight, bias, *sizes, groups)

    return form


def _batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Form:
    _require(running_mean is not None and running_var is not None and not training)
    given = (input, weight, bias, running_mean, running_var, training, momentum, eps, True)
    return _ATEN.batch_norm.default, given


def _layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Form:
    _require(len(normalized_shape) < input.dim())
    given = (input, list(normalized_shape), weight, bias, eps, False)  # as exported, no cuDNN
    return _ATEN.layer_norm.default, given


def _max_pool2d(
    input: Tensor,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Form:
    _require(input.dim() == 4 and not return_indices)
    sizes = [_of(kernel_size, 2), [] if stride is None else _of(stride, 2)]
    sizes += [_of(padding, 2), _of(dilation, 2)]
    return _ATEN.max_pool2d.default, (input, *sizes, ceil_mode)


def _avg_pool2d(
    input: Tensor,  # noqa: A002
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Form:
    _require(input.dim() == 4)
    sizes = [_of(kernel_size, 2), [] if stride is None else _of(stride, 2), _of(padding, 2)]
    rest = (ceil_mode, count_include_pad, divisor_override)
    return _ATEN.avg_pool2d.default, (input, *sizes, *rest)


def _adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Form:  # noqa: A002
    _require(input.dim() == 4)
    return _ATEN.adaptive_avg_pool2d.default, (input, _of(output_size, 2))


def _flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Form:  # noqa: A002
    _require(start_dim % input.dim() > 0)
    return _ATEN.flatten.using_ints, (input, start_dim, end_dim)


def _mean(input: Tensor, dim: Any = None, keepdim: bool = False) -> Form:  # noqa: A002
    axes = [dim] if isinstance(dim, int) else list(dim or [])
    _require(bool(axes) and all(axis % input.dim() for axis in axes))
    return _ATEN.mean.dim, (input, axes, keepdim)


def _along(function: Callable[..., Any]) -> Callable[..., Form]:
    def form(
        input: Tensor,  # noqa: A002
        dim: int | None = None,
        _stacklevel: int = 3,
        dtype: torch.dtype | None = None,
    ) -> Form:
        _require(isinstance(dim, int) and dim % input.dim() > 0 and dtype is None)
        return function, (input, dim)

    return form


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Form:  # noqa: A002
    _require(not training)
    return _ATEN.alias.default, (input,)


def _sum(input: Tensor, other: Any, *, alpha: float = 1) -> Form:  # noqa: A002
    known = isinstance(input, Tensor) and isinstance(other, Tensor)
    _require(known and input.shape == other.shape and alpha == 1)
    return _ATEN.add.Tensor, (input, other)


def _relu(input: Tensor, inplace: bool = False) -> Form:  # noqa: A002
    return _ATEN.relu.default, (input,)


def _silu(input: Tensor, inplace: bool = False) -> Form:  # noqa: A002
    return _ATEN.silu.default, (input,)


def _elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Form:  # noqa: A002
    return _ATEN.elu.default, (input, alpha)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Form:  # noqa: A002
    return _ATEN.leaky_relu.default, (input, negative_slope)


def _gelu(input: Tensor, *, approximate: str = "none") -> Form:  # noqa: A002
    _require(approximate == "none")
    return _ATEN.gelu.default, (input,)


def _tanh(input: Tensor) -> Form:  # noqa: A002
    return _ATEN.tanh.default, (input,)


def _sigmoid(input: Tensor) -> Form:  # noqa: A002
    return _ATEN.sigmoid.default, (input,)


_FORMS: dict[Any, Callable[..., Form]] = {
    F.linear: _linear,
    F.conv1d: _convolution(1, _ATEN.conv1d.default),
    F.conv2d: _convolution(2, _ATEN.conv2d.default),
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.dropout: _dropout,
    F.softmax: _along(_ATEN.softmax.int),
    F.log_softmax: _along(_ATEN.log_softmax.int),
    **dict.fromkeys((torch.flatten, Tensor.flatten), _flatten),
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__), _sum),
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((torch.tanh, Tensor.tanh), _tanh),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid), _sigmoid),
    F.gelu: _gelu,
    F.silu: _silu,
    F.elu: _elu,
    F.leaky_relu: _leaky_relu,
}
