"""The outcome of a fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modeconn.evaluation.result import PathResult
from modeconn.parameters.path_files import PathFile
from modeconn.parameters.paths import Path


@dataclass(frozen=True, eq=False)
class Fit:
    """A trained path, and how good it is.

    Attributes:
        path: through the given networks, bitwise, and the trained control points. With an
            alignment it ends at the permuted b, which is the same function.
        alignment: by which b was permuted; None where it was not.
        history: steps done, mean training loss and learning rate, of each hundredth of the fit.
        result: loss and error on the training data, norms' statistics recomputed.
        test: those on the test data, if there are any.
        stopped: why it ended.
        seconds: of the steps.
        about: the text that a file of the path gets: kind, bends, model, digests.
    """

    path: Path
    alignment: Any
    history: list[dict[str, float]]
    result: PathResult
    test: PathResult | None
    stopped: str
    seconds: float
    about: Mapping[str, str] = field(default_factory=dict)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the path as a safetensors file, which `load_path` reads."""
        assert isinstance(self.path, PathFile)  # all kinds that are trained have files
        self.path.save(file, self.about)

    def __str__(self) -> str:
        measured = {"train": self.result, **({"test": self.test} if self.test else {})}
        lines = [f"{self.path}: {self.stopped} in {self.seconds:.3g} s"]
        for name, result in measured.items():
            for metric in result.values:
                where, highest = result.highest(metric)
                lines.append(f"  {name} {metric}: at most {highest:.4g}, at t = {_text(where)}")
        if self.alignment is not None:
            lines.append("  b is permuted: the path ends at the same function, in other weights")
        return "\n".join(lines)


def _text(t: float | tuple[float, ...]) -> str:
    """Format the t of a curve, or the coordinates of a simplex."""
    if isinstance(t, tuple):
        return f"({', '.join(f'{x:.4g}' for x in t)})"
    return f"{t:.4g}"
