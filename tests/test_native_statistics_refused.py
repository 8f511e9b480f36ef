"""Bad input to the engine's statistics pass is refused, and Ctrl-C ends it."""

from __future__ import annotations

import numpy as np
import pytest

from native_cases import python
from native_statistics_cases import refused

NORM = {"op": "batch_norm", "scale": np.ones((1, 4)), "shift": np.zeros((1, 4)), "eps": 1e-5}
BAD = {
    "none": ((), {}, "layers must have a batch_norm"),
    "elsewhere": (
        (NORM,),
        {"call": "chain_outputs"},
        "batch_norm must be one of chain_statistics' layers",
    ),
    "scale": (
        ({**NORM, "scale": np.ones((1, 3))},),
        {},
        r"layers\[1\].scale must be \[1, 4\] float64",
    ),
    "no eps": (
        ({k: v for k, v in NORM.items() if k != "eps"},),
        {},
        r"\(batch_norm\) must have scale, shift and eps",
    ),
    "of": (
        ({**NORM, "of": -1},),
        {},
        r"must have the channels of the input, images of \[4, 2, 2\], got images of \[3",
    ),
    "one value": (
        ({"op": "avg_pool2d", "kernel": (2, 2)}, NORM),
        {"rows": 1},
        r"layers\[2\] must get more than one value per channel",
    ),
    "key": (
        ({**NORM, "momentum": 0.1},),
        {},
        r"layers\[1\] \(batch_norm\) has an unknown key 'momentum'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_chains_are_refused(name):
    layers, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        refused(*layers, **options)


def test_an_interrupt_ends_it():
    code = """
import os, signal, threading
import numpy as np
f = lambda *shape: np.zeros(shape, np.float32)
ones = np.ones((2000, 1))
conv = dict(op="conv2d", weights=[f(16, 16, 3, 3)], coefficients=ones, padding=(1, 1))
norm = dict(op="batch_norm", scale=np.ones((2000, 16)), shift=np.zeros((2000, 16)), eps=1e-5)
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    e.chain_statistics([f(256, 16, 32, 32)], ones, [conv, norm] * 4, threads=2)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = python(code)
    assert done.stdout.startswith("interrupted"), done
