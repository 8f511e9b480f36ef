"""Signatures of the C++ extension (csrc/bind_engine.cpp)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

def isas() -> list[str]: ...
def activations() -> list[str]: ...
def kernel_names(isa: str = "") -> tuple[str, str, str]: ...
def chain_outputs(
    terms: Sequence[npt.NDArray[Any]],
    coefficients: npt.NDArray[np.float64],
    layers: Sequence[Mapping[str, Any]],
    out: npt.NDArray[Any],
    *,
    activation: str = "identity",
    slope: float = 0.01,
    threads: int = 1,
    isa: str = "",
    winograd: bool = True,
) -> None: ...
def chain_sums(
    terms: Sequence[npt.NDArray[Any]],
    coefficients: npt.NDArray[np.float64],
    layers: Sequence[Mapping[str, Any]],
    targets: npt.NDArray[Any],
    *,
    loss: str = "cross_entropy",
    top5: bool = False,
    activation: str = "identity",
    slope: float = 0.01,
    threads: int = 1,
    isa: str = "",
    winograd: bool = True,
) -> npt.NDArray[np.float64]: ...
def chain_statistics(
    terms: Sequence[npt.NDArray[Any]],
    coefficients: npt.NDArray[np.float64],
    layers: Sequence[Mapping[str, Any]],
    *,
    activation: str = "identity",
    slope: float = 0.01,
    threads: int = 1,
    isa: str = "",
    winograd: bool = True,
) -> npt.NDArray[np.float64]: ...
