"""REPAIR: norms that give the networks along a path the statistics that their units should have.

Between two networks the units of deep layers hardly vary any more ("variance collapse"). A norm
behind every layer, whose scale and shift are the interpolated standard deviations and means of the
ends, restores them once its running statistics are recomputed (Jordan et al. 2023, "REPAIR").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modeconn.backends.precision import without_autocast
from modeconn.capture.trial import Runner, duplicate, loaded, output_of
from modeconn.data.batches import first_rows
from modeconn.data.inputs import Inputs, moved_like, take
from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import check_fit, positive
from modeconn.evaluation.statistics import recomputed
from modeconn.parameters.paths import Bezier, Line, Path, PolyChain
from modeconn.parameters.state import State
from modeconn.parameters.wrappers import unwrapped
from modeconn.training.alignment.proof import apart, exact_outputs

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Modules that read the weights of their layers, and do not always call them.
_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_BATCH = 250
# By layer, the means and variances of its channels.
Statistics = dict[str, tuple[Tensor, Tensor]]
_NORM = ("weight", "bias", "running_mean", "running_var")


class ChannelNorm(_BatchNorm):
    """Batch norm of channels (axis 1) of values with any number of axes."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - PyTorch's name
        """Takes any."""


class Renormalized(nn.Module):
    """A layer with a norm behind it.

    Args:
        layer: linear or convolutional.
        channels: of its value.
    """

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, ChannelNorm(channels)
        self.features_last = isinstance(layer, nn.Linear)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The layer's value, normalized and rescaled."""
        value: Tensor = self.layer(*inputs)
        if self.features_last and value.dim() > 2:
            swapped: Tensor = self.norm(value.transpose(1, -1)).transpose(1, -1)
            return swapped
        normalized: Tensor = self.norm(value)
        return normalized


class Repaired:
    """A model with norms, and the path through its parameters; unpacks as (model, path).

    Attributes:
        model: for `evaluate`, with `buffers="recompute"`.
        path: of the given path's kind, between the same networks.
        layers: names of the layers that got a norm; none where the model has batch norms.
    """

    def __init__(
        self, model: nn.Module, path: Path, layers: tuple[str, ...], given: Path, data: Any
    ) -> None:
        self.model, self.path, self.layers = model, path, layers
        self._given, self._data = given, data

    def __iter__(self) -> Iterator[Any]:
        yield self.model
        yield self.path

    def folded(
        self, t: float, *, batch_size: int | None = None, batches: int | None = None
    ) -> State:
        """Return the network at t without norms, for the model that was given.

        The statistics are recomputed from the data, and the norms become a part of the layers'
        weights and biases. At the ends it is the given networks, bit for bit.

        Args:
            t: the point.
            batch_size, batches: as for `recomputed`.

        Raises:
            ModeconnError: a layer has no bias, which the norm's shift would go to.
        """
        if float(t) in (0.0, 1.0):
            return self._given.at(t)
        state = recomputed(
            self.model, self.path, t, self._data, batch_size=batch_size, batches=batches
        )
        found = {}
        for name, value in state.items():
            plain = _plain_name(name, self.layers)
            if plain is not None:
                found[plain] = value
        for layer in self.layers:
            module = self.model.get_submodule(layer)
            assert isinstance(module, Renormalized)
            _fold(layer, module, state, found)
        return found


@without_autocast
def repair(
    model: nn.Module,
    path: Path,
    data: Any,
    *,
    samples: int = 10_000,
    batch_size: int | None = None,
) -> Repaired:
    """Add norms behind a model's layers that keep the ends' statistics along a path.

    `model, path = mc.repair(model, path, data)`, then `mc.evaluate(model, path, data,
    buffers="recompute")`. It helps between aligned networks, and is of no use between others; it
    lowers the error and may raise the loss. A model that has batch norms needs no others: it is
    returned as it is, and recomputed statistics do the same.

    Args:
        model: any module with linear or convolutional layers; it is left as it was.
        path: `Line`, `PolyChain` or `Bezier` of networks that fit it.
        data: as for `evaluate`: the training data; targets are not used.
        samples: the most rows of the data to take the ends' statistics from.
        batch_size: rows at a time, 250 by default.

    Returns:
        The model and path; `.folded(t)` is the network at t as a state dict of the given model.

    Raises:
        ModeconnError: bad input, or a model with no layer that a norm can stand behind.
    """
    if not isinstance(path, Line | PolyChain | Bezier):
        raise ModeconnError(
            f"path is a {type(path).__name__}: expected a Line, PolyChain or Bezier, with two ends"
        )
    check_fit(model, path)
    most, size = positive("samples", samples) or 1, positive("batch_size", batch_size) or _BATCH
    if any(isinstance(module, _BatchNorm) for module in unwrapped(model).modules()):
        return Repaired(duplicate(unwrapped(model)), path, (), path, data)
    runner = Runner(model)
    ends = path.control_points[0], path.control_points[-1]
    x = next(first_rows(data, size, size))
    runner.expect(x)
    with torch.no_grad():
        layers = _layers(runner, ends[0], x)
        if not layers:
            raise ModeconnError(
                f"the model {type(unwrapped(model)).__name__} has no linear or convolutional layer "
                "before its last one that is called once: there is nothing to repair"
            )
        statistics = _statistics(runner, ends, layers, first_rows(data, most, size))
        changed = _with_norms(duplicate(unwrapped(model)), layers)
        points = _control_points(path, layers, statistics)
        again = Line(*points) if isinstance(path, Line) else type(path)(points)
        for given, point in zip(ends, (points[0], points[-1])):
            _check_end((model, given), (changed, point), take(x, 0, 8))
    return Repaired(changed, again, tuple(layers), path, data)


def _layers(runner: Runner, state: State, x: Inputs) -> dict[str, int]:
    """Names of the layers that get a norm, with their channels, in the order of their calls."""
    module = loaded(runner.copy(), state)
    names: dict[nn.Module, list[str]] = {}
    for name, each in module.named_modules(remove_duplicate=False):
        if isinstance(each, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
            names.setdefault(each, []).append(name)
    calls: list[nn.Module] = []
    for each in names:
        each.register_forward_hook(lambda module, *_: calls.append(module))
    output_of(module, moved_like(x, state))
    found = {}
    for each in calls[:-1]:
        owner = module.get_submodule(names[each][0].rpartition(".")[0])
        if isinstance(owner, _READERS):
            continue
        if calls.count(each) == 1 and len(names[each]) == 1 and _folds(each):
            channels = each.out_features if isinstance(each, nn.Linear) else each.out_channels
            found[names[each][0]] = int(channels)  # type: ignore[arg-type]
    return found


def _folds(layer: nn.Module) -> bool:
    """Whether a layer's outputs are an axis of its weight."""
    return not isinstance(layer, _TRANSPOSED) or layer.groups == 1


def _statistics(
    runner: Runner,
    ends: Sequence[State],
    layers: Iterable[str],
    batches: Iterable[Inputs],
) -> list[Statistics]:
    """Means and variances of the layers' channels at each end, in one pass over the data."""
    watched = [_Watched(loaded(runner.copy(), end), layers) for end in ends]
    for x in batches:
        for each, end in zip(watched, ends):
            output_of(each.module, moved_like(x, end))
    return [each.statistics() for each in watched]


class _Watched:
    """A network, of some of whose layers the values are summed up, in float64."""

    def __init__(self, module: nn.Module, layers: Iterable[str]) -> None:
        self.module = module
        self._counts: Counter[str] = Counter()
        self._sums: dict[str, list[Tensor]] = {}
        for name in layers:
            module.get_submodule(name).register_forward_hook(partial(self._add, name))

    def _add(self, name: str, layer: nn.Module, _: Any, value: Tensor) -> None:
        axis = value.dim() - 1 if isinstance(layer, nn.Linear) else 1
        flat = value.double().movedim(axis, -1).flatten(0, -2)
        new = [flat.sum(0), flat.square().sum(0)]
        old = self._sums.get(name) or map(torch.zeros_like, new)
        self._sums[name] = [total + more for total, more in zip(old, new)]
        self._counts[name] += len(flat)

    def statistics(self) -> Statistics:
        """Means and variances of what the network ran on."""
        found = {}
        for name, sums in self._sums.items():
            mean, square = (total / self._counts[name] for total in sums)
            found[name] = mean, (square - mean.square()).clamp_min(0)
        return found


def _with_norms(model: nn.Module, layers: Mapping[str, int]) -> nn.Module:
    """A model with norms behind some layers."""
    for name, channels in layers.items():
        parent, _, key = name.rpartition(".")
        owner = model.get_submodule(parent)
        layer = owner.get_submodule(key)
        weight = next(layer.parameters())
        wrapped = Renormalized(layer, channels).to(device=weight.device, dtype=weight.dtype)
        setattr(owner, key, wrapped.train(layer.training))
    return model


def _control_points(
    path: Path, layers: Mapping[str, int], ends: Sequence[Statistics]
) -> list[State]:
    """The path's control points with norms, whose statistics are interpolated between the ends'."""
    last = len(path.control_points) - 1
    eps = ChannelNorm(1).eps
    points = []
    for k, given in enumerate(path.control_points):
        state = {_wrapped_name(name, layers): value for name, value in given.items()}
        for name in layers:
            pairs = [end[name] for end in ends]
            share = k / last
            mean, var = (torch.lerp(a, b, share) for a, b in zip(*pairs))
            first, second = [(v + eps).sqrt() for _, v in pairs]
            weight = given[f"{name}.weight"]
            own = {
                "weight": torch.lerp(first, second, share),
                "bias": mean,
                "running_mean": mean,
                "running_var": var,
            }
            state |= {f"{name}.norm.{key}": value.to(weight) for key, value in own.items()}
            state[f"{name}.norm.num_batches_tracked"] = torch.tensor(0, device=weight.device)
        points.append(state)
    return points


def _wrapped_name(name: str, layers: Mapping[str, int]) -> str:
    owner, _, key = name.rpartition(".")
    return f"{owner}.layer.{key}" if owner in layers else name


def _plain_name(name: str, layers: tuple[str, ...]) -> str | None:
    """An entry's name in the given model; None for those of norms."""
    owner, _, key = name.rpartition(".")
    layer, _, part = owner.rpartition(".")
    if layer in layers and part in ("layer", "norm"):
        return f"{layer}.{key}" if part == "layer" else None
    return name


def _check_end(given: tuple[nn.Module, State], changed: tuple[nn.Module, State], x: Inputs) -> None:
    """Raise a ModeconnError unless norms leave an end of the path as it was, in float64."""
    outputs = [
        exact_outputs(Runner(model, torch.float64), state, x) for model, state in (given, changed)
    ]
    # the norms' scales are rounded to the dtype of the weights
    dtype = next(v.dtype for v in changed[1].values() if v.is_floating_point())
    allowed = torch.finfo(dtype).eps ** 0.5
    if not all(apart([one], [other]) <= allowed for one, other in zip(*outputs)):
        raise ModeconnError(
            f"the model {type(unwrapped(given[0])).__name__} is another function with norms behind "
            "its layers: expected one that calls its layers, and does not read their weights"
        )


def _fold(name: str, module: Renormalized, state: State, found: State) -> None:
    """Fold a layer's norm into its weight and bias."""
    if f"{name}.bias" not in found:
        raise ModeconnError(
            f"layer '{name}' has no bias: expected one, for the norm's shift to be folded into; "
            "evaluate the repaired model, or build it with biases"
        )
    norm = {key: state[f"{name}.norm.{key}"].double() for key in _NORM}
    scale = norm["weight"] / (norm["running_var"] + module.norm.eps).sqrt()
    weight, bias = found[f"{name}.weight"], found[f"{name}.bias"]
    axis = 1 if isinstance(module.layer, _TRANSPOSED) else 0
    shape = [-1 if i == axis else 1 for i in range(weight.dim())]
    found[f"{name}.weight"] = (weight.double() * scale.view(shape)).to(weight.dtype)
    shifted = (bias.double() - norm["running_mean"]) * scale + norm["bias"]
    found[f"{name}.bias"] = shifted.to(bias.dtype)
