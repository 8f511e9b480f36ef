"""A trained subnetwork, and how several are written into a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modeconn.connection.subnetworks import Subnetwork


@dataclass(frozen=True)
class Trained:
    """A trained subnetwork with its loss and error over all training data.

    Attributes:
        epochs: that it was trained for; iterations, for a readout.
        seconds: its share of the time.
        reached: whether it reached the recipe's stop; False where there is none.
    """

    subnetwork: Subnetwork
    loss: float
    error: float
    epochs: int
    seconds: float
    reached: bool


def pack(prefix: str, found: Sequence[Trained | None]) -> tuple[dict[str, Tensor], list[Any]]:
    """Tensors under a prefix, and a record for JSON of each."""
    tensors: dict[str, Tensor] = {}
    records: list[Any] = []
    for number, trained in enumerate(found):
        if trained is None:
            records.append(None)
            continue
        # As text, since JSON has no inf.
        records.append(
            [repr(trained.loss), trained.error, trained.epochs, trained.seconds, trained.reached]
        )
        sub = trained.subnetwork
        tensors |= {
            f"{prefix}.{number}.weight.{i}": w.contiguous() for i, w in enumerate(sub.weights)
        }
        tensors |= {
            f"{prefix}.{number}.bias.{i}": b.contiguous()
            for i, b in enumerate(sub.biases)
            if b is not None
        }
    return tensors, records


def unpack(
    prefix: str, tensors: Mapping[str, Tensor], records: Sequence[Any], likes: Sequence[Subnetwork]
) -> list[Trained | None]:
    """What `pack` took apart; each subnetwork has the entry layer, the kept units and the number of layers of its like."""
    found: list[Trained | None] = []
    for number, (record, like) in enumerate(zip(records, likes)):
        if record is None:
            found.append(None)
            continue
        weights = tuple(tensors[f"{prefix}.{number}.weight.{i}"] for i in range(len(like.weights)))
        biases = tuple(tensors.get(f"{prefix}.{number}.bias.{i}") for i in range(len(like.biases)))
        found.append(
            Trained(
                Subnetwork(like.entry, like.kept, weights, biases), float(record[0]), *record[1:]
            )
        )
    return found
