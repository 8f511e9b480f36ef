"""Loss where one layer after another goes from one network to the other, in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn

from modeconn.errors import ModeconnError
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.layer_table import LayerTable
from modeconn.parameters.comparison import tied
from modeconn.parameters.groups import Groups, Patterns
from modeconn.parameters.paths import Line, Source
from modeconn.parameters.points import Points, is_count, t_values
from modeconn.parameters.wrappers import unwrapped

MODES = ("single", "cumulative")
# The group of what is in no layer: it moves at b alone.
_OTHERS = "(others)"


def layerwise(
    model: nn.Module,
    a: Source,
    b: Source,
    data: Any,
    points: Points = 11,
    *,
    mode: str = "single",
    layers: Patterns | None = None,
    **options: Any,
) -> LayerTable:
    """Evaluate networks between a and b of which some layers move, in one pass over the data.

    This is layer-wise linear mode connectivity (Adilova et al. 2024). What lies below the layers
    that move is computed once for all points that have it in common.

    Args:
        model: the architecture, as for `evaluate`.
        a, b: the two networks.
        data: as for `evaluate`, one data set.
        points: how many t from 0 to 1, or the values.
        mode: "single": one layer is (1 - t) a + t b, and all others are those of a; "cumulative":
            the layers up to that one are.
        layers: patterns, as `Line` takes them for its groups, in the order of the table; by default
            each module with parameters of its own is a layer, with its buffers. Entries that are in
            none stay those of a.
        **options: of `evaluate`: loss, metrics, buffers, backend, batch_size, resume and so on.

    Returns:
        A table, layer × t, of loss and metrics, with their barriers; print it.

    Raises:
        ModeconnError: bad input, named in one line.
    """
    if mode not in MODES:
        raise ModeconnError(f'mode is {mode!r}: expected "single" or "cumulative"')
    t = _t_of(points)
    path = Line(a, b)
    names = _layers_apart(path, layers_of(model) if layers is None else layers)
    count, columns = len(names), len(path.groups.names) if path.groups else 0
    moving = np.eye(count, columns) if mode == "single" else np.tri(count, columns)
    # both networks themselves come last: barriers are above the line between their losses
    rows = np.concatenate([np.kron(moving, t[:, None]), np.zeros((1, columns))])
    rows = np.concatenate([rows, np.ones((1, columns))])
    result = evaluate(model, path, data, rows if columns > 1 else rows[:, 0], **options)
    if isinstance(result, dict):
        raise ModeconnError(
            f"data are {len(result)} data sets by name: layerwise takes one of them at a time"
        )
    return LayerTable(
        layers=names,
        t=t,
        values={name: column[:-2].reshape(count, len(t)) for name, column in result.values.items()},
        ends={
            name: (float(column[-2]), float(column[-1])) for name, column in result.values.items()
        },
        samples=result.samples,
        passes=result.passes,
        backend=result.backend,
        seconds=result.seconds,
        info=result.info | {"mode": mode},
    )


def layers_of(model: nn.Module) -> dict[str, list[str]]:
    """Return the entries of each module that has parameters or buffers of its own, by its name.

    Tied entries are with the first of them; parameters of the model itself are layers by their own
    names.
    """
    state = unwrapped(model).state_dict()
    own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    first = {other: one for one, other in tied(own)}
    layers: dict[str, list[str]] = {}
    for name, value in own.items():
        if value.is_floating_point():
            module = first.get(name, name).rpartition(".")[0]
            layers.setdefault(module or first.get(name, name), []).append(name)
    return layers


def _layers_apart(path: Line, layers: Patterns) -> tuple[str, ...]:
    """Give each layer of a line a t of its own, and all other entries one more; name the layers."""
    state = path.control_points[0]
    groups = Groups.read(layers, state, 1)
    others = [k for k in state.keys() - groups.of.keys() if state[k].is_floating_point()]
    apart: dict[str, list[str]] = {name: [] for name in groups.names}
    for key, group in groups.of.items():
        apart[groups.names[group]].append(key)
    path.move_apart({**apart, _OTHERS: others} if others else apart)
    return groups.names


def _t_of(points: Points) -> np.ndarray:
    if not is_count(points):
        return t_values(points, 1, "layerwise")
    if points < 2:
        raise ModeconnError(f"points is {points}: expected at least 2, from t = 0 to t = 1")
    return np.linspace(0.0, 1.0, int(points))
