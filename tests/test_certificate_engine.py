"""The engine against a plain pass: what rounding explains, and nothing else, may differ."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import modeconn as mc
from modeconn.connection.measurement import _check_engine
from modeconn.connection.rounding import Sensitivity

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
# Of both passes together, in float64: more than the fixed tolerance of 1e-8 of the outputs.
OFF = 1e-6


def check(off: float, bound: float | None, plain: float = 2.0) -> None:
    """Checks a path of one breakpoint, where the engine is off and rounding has a bound."""
    outputs = X * 2
    subject = SimpleNamespace(
        path=SimpleNamespace(control_points=[{"w": torch.ones(1)}]),
        structure=SimpleNamespace(run=lambda state, x: x * plain),
    )
    errors = torch.full_like(outputs, 0.0 if bound is None else bound / 2**-53)
    rounded = SimpleNamespace(of_rows=lambda x: [Sensitivity(errors)])

    def forward(x: Tensor) -> Tensor:
        return (outputs + off)[None]

    _check_engine(subject, X, forward, "float64", None if bound is None else rounded)


def test_rounding_explains_what_is_within_its_bound():
    check(OFF, OFF)
    check(0.0, None)


@pytest.mark.parametrize("bound", [None, 0.0, OFF / 4, torch.inf])
def test_what_it_does_not_explain_is_refused(bound):
    with pytest.raises(mc.ModeconnError, match="breakpoint 0: a plain pass gives other outputs"):
        check(OFF, bound)


@pytest.mark.parametrize("plain", [torch.inf, torch.nan])
def test_a_plain_pass_that_overflows_is_refused(plain):
    with pytest.raises(mc.ModeconnError, match="breakpoint 0: a plain pass gives other outputs"):
        check(0.0, OFF, plain)
