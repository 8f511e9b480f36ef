"""Trained subnetworks, packed into tensors and records and unpacked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modeconn.connection.subnetworks import Subnetwork


@dataclass(frozen=True)
class TrainedSubnetwork:
    """A trained subnetwork with its loss and error over all training data.

    Attributes:
        epochs: of its training; iterations, for a readout.
        seconds: its share of the time.
        reached: whether it reached the recipe's stop; False where there is none.
    """

    subnetwork: Subnetwork
    loss: float
    error: float
    epochs: int
    seconds: float
    reached: bool


@dataclass(frozen=True)
class BestSubnetwork:
    """The best subnetwork so far of one entry layer of one network.

    Attributes:
        subnetwork: its weights.
        loss, error: over all training data.
        method: "readout", "head", "trained", "separable" or "memorise".
        epochs, seconds: spent on this entry layer in all rounds together.
    """

    subnetwork: Subnetwork
    loss: float
    error: float
    method: str
    epochs: int
    seconds: float

    @staticmethod
    def of(result: TrainedSubnetwork, method: str) -> BestSubnetwork:
        """Takes a result that is the only one of its entry layer."""
        sub, loss, error = result.subnetwork, result.loss, result.error
        return BestSubnetwork(sub, loss, error, method, result.epochs, result.seconds)

    def to_dict(self, side: str) -> dict[str, Any]:
        """Returns the record that a connection keeps of it."""
        sub = self.subnetwork
        return {
            "side": side,
            "entry": sub.entry,
            "method": self.method,
            "kept": len(sub.kept),
            "units": sub.kept.tolist(),
            "widths": list(sub.widths),
            "loss": self.loss,
            "error": self.error,
            "epochs": self.epochs,
            "seconds": round(self.seconds, 2),
        }


def pack(
    prefix: str, found: Sequence[TrainedSubnetwork | None]
) -> tuple[dict[str, Tensor], list[Any]]:
    """Returns tensors under a prefix, and a record of each that JSON can hold."""
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
        name, sub = f"{prefix}.{number}", trained.subnetwork
        for i, (weight, bias) in enumerate(zip(sub.weights, sub.biases)):
            tensors[f"{name}.weight.{i}"] = weight.contiguous()
            if bias is not None:
                tensors[f"{name}.bias.{i}"] = bias.contiguous()
    return tensors, records


def unpack(
    prefix: str, tensors: Mapping[str, Tensor], records: Sequence[Any], likes: Sequence[Subnetwork]
) -> list[TrainedSubnetwork | None]:
    """Puts together again what `pack` took apart.

    Args:
        likes: have each subnetwork's entry layer, kept units and number of layers.
    """
    found: list[TrainedSubnetwork | None] = []
    for number, (record, like) in enumerate(zip(records, likes)):
        if record is None:
            found.append(None)
            continue
        name, layers = f"{prefix}.{number}", range(len(like.weights))
        weights = tuple(tensors[f"{name}.weight.{i}"] for i in layers)
        biases = tuple(tensors.get(f"{name}.bias.{i}") for i in layers)
        sub = Subnetwork(like.entry, like.kept, weights, biases)
        loss, *others = record
        found.append(TrainedSubnetwork(sub, float(loss), *others))
    return found
