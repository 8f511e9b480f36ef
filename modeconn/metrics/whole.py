"""Metrics of a whole data set: those that are no means over samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from modeconn.errors import ModeconnError


class DatasetMetric:
    """A metric of all samples together: a calibration error, an area under a curve, an F1 score.

        mc.evaluate(model, path, data, metrics=["loss", mc.DatasetMetric(ece)])

    Its function is called once for each point, behind the pass, with the outputs of all samples, so
    that its value does not depend on batches. These outputs are kept in main memory until then, at
    all points: T times what the network returns for the data.

    Args:
        function: (outputs [N, …], targets [N, …]) → one number. Outputs are on the CPU, in the
            precision of the evaluation: whatever the model returns, or the `logits` of an object
            that has some. Targets are as a callable metric gets them.
        name: of the metric; by default that of the function.

    Raises:
        ModeconnError: the function cannot be called.
    """

    def __init__(self, function: Callable[[Any, Tensor], Any], name: str | None = None) -> None:
        if not callable(function):
            raise ModeconnError(
                f"function is of type {type(function).__name__}: expected a callable of outputs "
                "and targets"
            )
        self.function = function
        self.name = str(name or getattr(function, "__name__", type(function).__name__))

    def __repr__(self) -> str:
        return f"DatasetMetric({self.name})"

    def value(self, outputs: Any, targets: Tensor) -> float:
        """Return the metric's number for all samples.

        Raises:
            ModeconnError: the function returns something else.
        """
        value = self.function(outputs, targets)
        try:
            array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
            if array.size == 1:
                return float(array.item())
        except (TypeError, ValueError):
            pass
        shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
        raise ModeconnError(f"metric {self.name!r} gives {shape}: expected one number")
