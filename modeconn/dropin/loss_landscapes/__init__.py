"""The functions, wrappers and metrics of loss_landscapes 3.0.6, in far fewer passes.

    import modeconn.dropin.loss_landscapes as loss_landscapes

Scripts stay as they are. Values, order of the points and random numbers are those of the package
(modeconn/dropin/loss_landscapes/contract.py has its rules); the user's models are left alone.
"""

from typing import Any

from modeconn.dropin.loss_landscapes import metrics
from modeconn.dropin.loss_landscapes.contract import VERSION, installed
from modeconn.dropin.loss_landscapes.scans import (
    linear_interpolation,
    planar_interpolation,
    point,
    random_line,
    random_plane,
)
from modeconn.dropin.loss_landscapes.wrappers import GeneralModelWrapper, ModelWrapper

__all__ = [
    "GeneralModelWrapper",
    "ModelWrapper",
    "linear_interpolation",
    "metrics",
    "planar_interpolation",
    "point",
    "random_line",
    "random_plane",
]


def __getattr__(name: str) -> Any:
    found = installed()
    other = f", and {found} is installed: import loss_landscapes itself for it" if found else ""
    raise AttributeError(
        f"modeconn.dropin.loss_landscapes has no attribute {name!r}: it has the names of "
        f"loss_landscapes {VERSION}{other}"
    )
