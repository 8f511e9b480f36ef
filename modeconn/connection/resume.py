"""Keeps the fits of a search in a folder: the same search goes on from there to the same end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeconn.connection.features import Features
from modeconn.connection.subnetworks import Subnetwork
from modeconn.connection.trained_subnetwork import TrainedSubnetwork, pack, unpack
from modeconn.errors import ModeconnError
from modeconn.resuming import Record, claim


class Fits:
    """The fits of one search, in the order in which they are made.

    What a search does next depends on its settings and on the fits before alone. So a search that
    is begun again does the same fits; those that are finished in the folder are read.

    Args:
        folder: a folder, made if it is not there; None to keep nothing.
        settings: all that decides what the search does; the folder must hold a search with the
            same.

    Raises:
        ModeconnError: the folder holds something else, or a search with other settings or data.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.number = None if folder is None else Path(folder), 0
        if self.folder is not None:
            # The sums of the features may differ in rounding between machines.
            claim(self.folder, "search.json", "search", settings, approximate=("features",))

    def next(
        self, starts: Sequence[Subnetwork], fit: Callable[[Path | None], list[TrainedSubnetwork]]
    ) -> list[TrainedSubnetwork]:
        """Reads or makes the next fit.

        Args:
            starts: the subnetworks to begin with.
            fit: makes it; it is given a file that keeps an unfinished training.
        """
        if self.folder is None:
            return fit(None)
        file = self.folder / f"fit-{self.number:03}.safetensors"
        self.number += 1
        record = Record(file, "finished fit", {})
        if record.exists:
            return _read(record, starts)
        results = fit(file.with_suffix(".training"))
        tensors, fits = pack("fit", results)
        record.write(tensors, {"fits": fits})
        return results


def search_settings(
    ends: Mapping[str, Mapping[str, Tensor]],
    features: Mapping[str, Features],
    units: Mapping[int, Tensor],
    **settings: Any,
) -> dict[str, Any]:
    """Describes all that decides a search.

    These are the networks bit for bit, the labels, the sums of the features, the kept units, and
    further settings.
    """
    weights = hashlib.sha256()
    for end in ends.values():
        for key in sorted(end):
            weights.update(key.encode())
            weights.update(
                end[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    labels = hashlib.sha256(next(iter(features.values())).labels.cpu().numpy().tobytes())
    kept = hashlib.sha256(json.dumps([u.tolist() for u in units.values()]).encode())
    top = max(units)
    sums = [float(each.entry(top).double().sum()) for each in features.values()]
    return {
        "networks": weights.hexdigest(),
        "labels": labels.hexdigest(),
        "kept": kept.hexdigest(),
        "features": sums,
        **settings,
    }


def _read(record: Record, starts: Sequence[Subnetwork]) -> list[TrainedSubnetwork]:
    tensors, state = record.read()
    try:
        found = unpack("fit", tensors, state["fits"], starts)
    except (KeyError, ValueError, TypeError) as error:
        raise ModeconnError(
            f"{record.file} is no finished fit: remove it to do it again ({error})"
        ) from error
    results = [each for each in found if each is not None]
    if len(results) != len(starts):
        raise ModeconnError(
            f"{record.file} holds {len(results)} subnetworks, not {len(starts)}: "
            "remove it to do them again"
        )
    return results
