"""Bad graphs of the engine's steps are refused."""

from __future__ import annotations

import numpy as np
import pytest

from native_chain_cases import engine
from native_graph_cases import Net


def bad(*layers, shape=(3, 4, 5)):
    net = Net(2, shape, points=1)
    net.product(3, padding=(1, 1)) if len(shape) == 3 else net.product(3)
    return lambda: engine.chain_outputs(
        net.terms, net.coefficients, [*net.layers, *layers], np.zeros((1, 2, 3), np.float32)
    )


BAD = {
    "input": (
        bad(dict(op="flatten", input=1)),
        r"layers\[1\].input must be a step before it, or -1 for the terms, got 1",
    ),
    "add": (bad(dict(op="add", inputs=[-2])), "must be a step before it"),
    "no inputs": (bad(dict(op="add", inputs=[])), r"layers\[1\] \(add\) must have inputs"),
    "affine": (
        bad(dict(op="affine", scale=np.ones((1, 3)))),
        r"layers\[1\] \(affine\) must have scale and shift",
    ),
    "scale": (
        bad(dict(op="affine", scale=np.ones((1, 4)), shift=np.ones((1, 4)))),
        r"layers\[1\].scale must be \[1, 3\] float64",
    ),
    "one factor": (
        bad(dict(op="multiply", inputs=[0])),
        r"layers\[1\] \(multiply\) must have two inputs, got 1",
    ),
    "factors": (
        bad(dict(op="max_pool2d", kernel=(2, 2)), dict(op="multiply", inputs=[0, 1])),
        (
            r"of one shape, or the second one pixel, "
            r"got images of \[3, 4, 5\] and images of \[3, 2, 2\]"
        ),
    ),
    "no channels": (bad(dict(op="take", channels=[])), r"layers\[1\] \(take\) must have channels"),
    "channels": (
        bad(dict(op="take", channels=[0, 3])),
        r"layers\[1\].channels must be in \[0, 3\), or -1 for zeros, got 3",
    ),
    "group norm": (
        bad(dict(op="group_norm", scale=np.ones((1, 3)))),
        r"\(group_norm\) must have scale, shift and eps",
    ),
    "groups of a norm": (
        bad(dict(op="group_norm", scale=np.ones((1, 3)), shift=np.ones((1, 3)), eps=0.1, groups=2)),
        r"layers\[1\].groups must divide the 3 channels, got 2",
    ),
    "means rounded up": (
        bad(dict(op="avg_pool2d", kernel=(2, 2), ceil=True)),
        r"layers\[1\].ceil goes with max_pool2d only",
    ),
    "sizes": (
        bad(dict(op="max_pool2d", kernel=(2, 2)), dict(op="concat", inputs=[0, 1])),
        (
            r"layers\[2\].inputs must be rows, or images of one size, "
            r"got images of \[3, 4, 5\] and images of \[3, 2, 2\]"
        ),
    ),
    "shapes": (
        bad(dict(op="flatten"), dict(op="add", inputs=[1, 0])),
        "of one shape, got rows of 60 and images",
    ),
    "two flattens": (
        bad(dict(op="flatten", input=0), dict(op="flatten", input=-1)),
        "flatten must come once only",
    ),
    "flattened rows": (
        bad(dict(op="flatten"), shape=(4,)),
        "flatten must get images, got rows of 3",
    ),
    "behind flatten": (
        bad(dict(op="flatten"), dict(op="max_pool2d", kernel=(1, 1), input=0)),
        "must be behind",
    ),
    "terms": (
        bad(dict(op="terms", terms=[], coefficients=np.ones((1, 0)))),
        r"layers\[1\].terms must not be empty",
    ),
    "coefficients": (
        bad(dict(op="terms", terms=[np.zeros((2, 4), np.float32)], coefficients=np.ones((2, 1)))),
        r"layers\[1\].coefficients must be \[1, 1\] float64",
    ),
    "rows": (
        bad(dict(op="terms", terms=[np.zeros((3, 4), np.float32)], coefficients=np.ones((1, 1)))),
        r"layers\[1\].terms\[0\] must be \[2, any\] float32, got \[3, 4\]",
    ),
    "images later": (
        bad(
            dict(
                op="terms", terms=[np.zeros((2, 4, 1, 1), np.float32)], coefficients=np.ones((1, 1))
            ),
            shape=(4,),
        ),
        "must be rows where the first terms are, got images",
    ),
    "add to a product": (
        bad(
            dict(weights=[np.zeros((5, 3), np.float32)], coefficients=np.ones((1, 1)), add=-1),
            shape=(4,),
        ),
        r"layers\[1\].add must be rows of 5 like the step's value, got rows of 4",
    ),
    "groups": (
        bad(
            dict(
                op="conv2d",
                weights=[np.zeros((4, 3, 1, 1), np.float32)],
                coefficients=np.ones((1, 1)),
                groups=2,
            )
        ),
        r"groups must divide the 3 channels, got 2",
    ),
    "units": (
        bad(
            dict(
                op="conv2d",
                weights=[np.zeros((4, 1, 1, 1), np.float32)],
                coefficients=np.ones((1, 1)),
                groups=3,
            )
        ),
        r"groups must divide the 4 units, got 3",
    ),
    "dilation": (
        bad(
            dict(
                op="conv2d",
                weights=[np.zeros((4, 3, 3, 3), np.float32)],
                coefficients=np.ones((1, 1)),
                dilation=(2, 1),
            )
        ),
        r"got kernel 3x3 for 4x5 with padding 0x0 and dilation 2x1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_graphs_are_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
