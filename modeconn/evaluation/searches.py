"""Search for the best point of a path: a mixture's best weights, each pass for many of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.evaluation.arguments import positive
from modeconn.evaluation.evaluator import evaluate
from modeconn.evaluation.result import PathResult
from modeconn.evaluation.resume import fingerprint
from modeconn.files.fingerprints import digest_of, digest_of_tensors
from modeconn.files.writing import locked
from modeconn.parameters.paths import Path
from modeconn.parameters.searching import STRATEGIES, Space
from modeconn.resuming import Record


def search(
    model: nn.Module,
    path: Path,
    data: Any,
    budget: int = 100,
    *,
    strategy: str = "random",
    metric: str = "loss",
    batch: int | None = None,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    **options: Any,
) -> PathResult:
    """Search a path for the point of the smallest metric, many points in each pass over the data.

    Args:
        model: the architecture, as for `evaluate`.
        path: a `Mixture`, whose weights are at least 0 and sum to 1 (in each of its groups), or
            any other path, whose coordinates are in its extent, by default [0, 1].
        data: as for `evaluate`, one data set that can be read again and again.
        budget: how many points to evaluate in all.
        strategy: "random", "grid" (the finest that the budget has room for), "greedy" (a greedy
            soup, Wortsman et al. 2022), or "cma" (CMA-ES, needs the package cmaes).
        metric: what is to be small: one of the metrics that are evaluated.
        batch: points in a pass; by default 64, and a generation of CMA-ES.
        seed: everything drawn follows from it.
        resume: a file that keeps what was found, written after each pass, and the sums within a
            pass in a file beside it. The same call after an interruption continues. A finished
            search leaves it; remove it.
        **options: of `evaluate`.

    Returns:
        All points that were evaluated, in the order in which they were asked for;
        `result.lowest(metric)` is the best, for `path.at`. `passes` counts those over the data.

    Raises:
        ModeconnError: bad input, named in one line.
    """
    if strategy not in STRATEGIES:
        raise ModeconnError(f"strategy is {strategy!r}: expected one of {', '.join(STRATEGIES)}")
    whole, rows = positive("budget", budget), positive("batch", batch)
    if isinstance(data, Mapping) and "labels" not in data:
        raise ModeconnError("data: several data sets by name; a search takes one of them")
    about = {"strategy": strategy, "budget": whole, "batch": rows, "seed": seed, "metric": metric}
    with locked(resume):
        identity = {} if resume is None else _identity(path, data, options)
        kept = _Kept(resume, about | identity)
        asking = STRATEGIES[strategy](Space.of(path), budget, rows, seed)
        scores: np.ndarray | None = None
        while True:
            try:
                asked = next(asking) if scores is None else asking.send(scores)
            except StopIteration:
                break
            points = asked[:, 0] if path.dim == 1 else asked
            found = kept.found(points)
            if found is None:
                found = kept.keep(
                    evaluate(model, path, data, points, resume=kept.within, **options)
                )
            scores = found.metric(metric)
        return kept.result({"search": strategy, "metric": metric, "budget": budget})


def _identity(path: Path, data: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns digests of what decides the outcome besides the strategy, in lists."""
    plain = {name: value for name, value in options.items() if name != "progress"}
    corners = np.eye(path.dim)[:, 0] if path.dim == 1 else np.eye(path.dim)
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    tensors = pair and all(isinstance(part, torch.Tensor) for part in data)
    content = digest_of_tensors({"inputs": data[0], "targets": data[1]}) if tensors else ""
    weights = fingerprint(path, corners)["path"]
    return {"path": weights, "options": [digest_of([sorted(plain.items())])], "data": [content]}


class _Kept:
    """The results of a search so far, pass by pass.

    Args:
        file: to keep it in; None for nothing.
        settings: that decide the outcome.
    """

    def __init__(self, file: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._record = Record(file, "unfinished search", settings)
        self._parts: list[PathResult] = []
        tensors, state = self._record.read()
        try:
            self._before = [
                _read(tensors, each, i) for i, each in enumerate(state.get("parts", []))
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ModeconnError(
                f"{self._record.file} is damaged ({error}): remove it to start anew"
            ) from error

    @property
    def within(self) -> File | None:
        """The file for the sums of the pass that is under way."""
        file = self._record.file
        return None if file is None else file.with_name(f"{file.name}.pass")

    def found(self, points: np.ndarray) -> PathResult | None:
        """Return the result of the next pass, if it was found before.

        Raises:
            ModeconnError: other points were evaluated then.
        """
        if len(self._parts) >= len(self._before):
            return None
        part = self._before[len(self._parts)]
        if not np.array_equal(part.t, points):
            raise ModeconnError(
                f"{self._record.file} holds a search that went on otherwise (another version of "
                "the strategy?): remove it to start anew"
            )
        self._parts.append(part)
        return part

    def keep(self, part: PathResult) -> PathResult:
        """Take up the result of a pass, and write all so far.

        Raises:
            ModeconnError: it is of other data than those before.
        """
        if self._parts and part.samples != self._parts[0].samples:
            raise ModeconnError(
                f"the data has {part.samples:,} samples, and {self._parts[0].samples:,} in the "
                "passes before: expected the same data"
            )
        self._parts.append(part)
        tensors: dict[str, torch.Tensor] = {}
        states = []
        for i, each in enumerate(self._parts):
            tensors[f"{i}/t"] = torch.from_numpy(each.t.copy())
            for name, column in each.values.items():
                tensors[f"{i}/values/{name}"] = torch.from_numpy(column.copy())
            states.append(
                {
                    "metrics": list(each.values),
                    "samples": each.samples,
                    "passes": each.passes,
                    "backend": each.backend,
                    "seconds": each.seconds,
                    "info": each.info,
                }
            )
        self._record.write(tensors, {"parts": states})
        if self.within is not None:
            self.within.unlink(missing_ok=True)
        return part

    def result(self, info: Mapping[str, str | int | float]) -> PathResult:
        """Return all passes as one result."""
        last, names = self._parts[-1], [*self._parts[-1].values]
        values = {name: self._joined(name) for name in names}
        return PathResult(
            t=np.concatenate([part.t for part in self._parts]),
            values=values,
            samples=last.samples,
            passes=sum(part.passes for part in self._parts),
            backend=last.backend,
            seconds=sum(part.seconds for part in self._parts),
            info={**last.info, **info},
        )

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([part.values[name] for part in self._parts])


def _read(tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any], i: int) -> PathResult:
    plain = {name: state[name] for name in ("samples", "passes", "backend", "seconds", "info")}
    values = {name: tensors[f"{i}/values/{name}"].numpy() for name in state["metrics"]}
    return PathResult(t=tensors[f"{i}/t"].numpy(), values=values, **plain)
