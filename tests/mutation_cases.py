"""A saved connection as a table of values, and changes of it one at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from modeconn.connection import connection as module
from modeconn.connection.certificate import Certificate
from modeconn.connection.connection import BREAKPOINTS, CONTENT, Connection
from modeconn.connection.json_values import plain
from modeconn.connection.structure import ChainStructure
from modeconn.connection.verification import Claims, certify, verify
from modeconn.files.fingerprints import digest_of_json
from modeconn.parameters import state as states
from naive import mlp
from walk import Walk, walk

SPEC = "mlp:3-7x2-2"
LABELS = ("a", "S_2 of a", "breakpoint 2", "my own", "breakpoint 4", "S_0 of b", "b")
Place = tuple[Any, ...]


class PlainForward:
    """Stands for the engine, whose plan would take longer than everything else here."""

    def __init__(self, model: nn.Module, path, count, sample, precision) -> None:
        chain = ChainStructure.of(model, sample).chain if CHAIN is None else CHAIN
        self._chain = chain
        self._points = [
            {key: value.double() for key, value in point.items()} for point in path.control_points
        ]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([self._chain.run(point, x.double()) for point in self._points])


CHAIN = None


@dataclass
class Saved:
    """What a folder holds, with the true certificates."""

    walk: Walk
    test: tuple[Tensor, Tensor]
    content: dict[str, Any]
    packed: dict[str, Tensor]
    truth: Certificate
    folder: Path

    def connection(self, content: dict[str, Any], packed: dict[str, Tensor]) -> Connection:
        """Write it with digests that fit, and load it."""
        content = plain(content)
        if packed is not self.packed:
            states.save(packed, self.folder / BREAKPOINTS)
        if content["sha256"] == self.content["sha256"]:
            content["sha256"] = module._sha256(self.folder / BREAKPOINTS)
        content["digest"] = digest_of_json(content)
        (self.folder / CONTENT).write_text(json.dumps(content))
        try:
            return Connection.load(self.folder)
        finally:
            if packed is not self.packed:
                states.save(self.packed, self.folder / BREAKPOINTS)

    def verified(self, content: dict[str, Any], packed: dict[str, Tensor]) -> Certificate:
        """Verify it, as somebody does who has the networks and the data."""
        connection = self.connection(content, packed)
        ends = {"a": self.walk.points[0], "b": self.walk.points[-1]}
        return verify(self.walk.model, connection, self.walk.data, test=self.test, **ends)


def saved(folder: Path) -> Saved:
    """Save a connection with two certificates, a target, labels, a model and details."""
    w = walk(mlp(3, 7, 7, 2), (3,), samples=24)
    # Rewrites write a unit that is dead until the last one.
    for point, value in zip(w.points[1:5], (0.3, 0.3, 0.7, 0.7)):
        point["0.weight"][6] = value
    test = (w.x[:9] + 0.5, w.y[:9])
    claims = Claims(labels=LABELS, target=50.0)
    certificates = [certify(w.model, w.chain, w.path, data, claims) for data in (w.data, test)]
    kinds = tuple(segment.kind for segment in certificates[0].segments)
    details = {"target": 50.0, "seed": 3, "found": [{"side": "a", "loss": 0.5}], "method": "own"}
    Connection(w.path, kinds, *certificates, SPEC, details).save(folder)
    content = json.loads((folder / CONTENT).read_text())
    with safe_open(folder / BREAKPOINTS, framework="pt") as file:
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    made = Saved(w, test, content, packed, certificates[0], folder)
    made.truth = made.verified(content, packed)
    return made


def leaves(content: Any, place: Place = ()) -> Iterator[Place]:
    """The places of all values that are no table and no list."""
    if isinstance(content, dict):
        items = content.items()
    elif isinstance(content, list):
        items = enumerate(content)
    else:
        yield place
        return
    for key, value in items:
        yield from leaves(value, (*place, key))


def value_at(content: Any, place: Place) -> Any:
    for key in place:
        content = content[key]
    return content


def changes_of(value: Any) -> list[Any]:
    """Other values of the same kind, and some that are none."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, "nan"]
    if isinstance(value, float):
        return [value + 1e-6 * max(abs(value), 1e-3), 0.5 * value - 1e-9, "nan", "inf"]
    if isinstance(value, str):
        other = {"rewrite": "swing", "swing": "shift", "shift": "swing", "S_2 of a": "S_2 of b"}
        return [other.get(value, value + "x"), ""]
    return [1.0, "x"]


def with_value(content: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    content = copy.deepcopy(content)
    value_at(content, place[:-1])[place[-1]] = value
    return content


def with_entry(packed: dict[str, Tensor], name: str, index: int) -> dict[str, Tensor]:
    """Change one number of one tensor."""
    changed = packed[name].clone()
    flat = changed.view(-1)
    flat[index] = flat[index] + (0.5 if changed.is_floating_point() else 1)
    return packed | {name: changed}
