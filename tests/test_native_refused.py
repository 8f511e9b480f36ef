"""Bad input to the engine's chains is refused; an instruction set can be forced; Ctrl-C ends it."""

import numpy as np
import pytest

from native_cases import engine, python
from native_chain_cases import ISAS, make


def broken(**changes):
    case = dict(make(6, (4, 3), 2, np.float32), targets=np.zeros(6, np.int64), options={})
    layer = dict(case["layers"][0], **changes.pop("layer", {}))
    case.update(layers=[layer], **changes)
    return case


BAD = {
    "label": (dict(targets=np.array([0, 1, 2, 3, 0, 0])), r"\[0, 3\), got 3 at row 3"),
    "negative label": (dict(targets=np.array([0, -1, 2, 0, 0, 0])), "got -1 at row 1"),
    "label type": (
        dict(targets=np.zeros(6, np.int32)),
        r"targets must be \[6\] int64, got \[6\] int32",
    ),
    "label count": (dict(targets=np.zeros(5, np.int64)), r"targets must be \[6\] int64, got \[5\]"),
    "terms": (dict(terms=[]), "terms must not be empty"),
    "term type": (dict(terms=[np.zeros((6, 4), np.float16)]), "float32 or float64, got .* float16"),
    "term shapes": (
        dict(terms=[np.zeros((6, 4), np.float32), np.zeros((5, 4), np.float32)]),
        r"terms\[1\] must be \[6, 4\] float32",
    ),
    "column stride": (
        dict(terms=[np.zeros((6, 8), np.float32)[:, ::2]] * 2),
        "contiguous in its last dimension",
    ),
    "coefficients": (
        dict(coefficients=np.zeros((2, 3))),
        r"coefficients must be \[any, 2\] float64, got \[2, 3\]",
    ),
    "weights": (
        dict(layer=dict(weights=[np.zeros((3, 5), np.float32)] * 2)),
        r"layers\[0\].weights\[0\] must be \[any, 4\]",
    ),
    "no weights": (dict(layer=dict(weights=[])), "must not be empty"),
    "no units": (dict(layer=dict(weights=[np.zeros((0, 4), np.float32)] * 2)), "at least one unit"),
    "biases": (
        dict(layer=dict(biases=[np.zeros(3, np.float32)])),
        "as many biases as weights or none, got 1 and 2",
    ),
    "bias coefficients": (
        dict(layer=dict(bias_coefficients=np.zeros((2, 3)))),
        r"bias_coefficients must be \[2, 2\] float64, got \[2, 3\]",
    ),
    "layer points": (
        dict(layer=dict(coefficients=np.zeros((3, 2)))),
        r"layers\[0\].coefficients must be \[2, 2\]",
    ),
    "activation": (dict(layer=dict(activation="swish")), "got 'swish'"),
    "unknown key": (dict(layer=dict(bias=None)), "unknown key 'bias'"),
    "threads": (dict(options=dict(threads=0)), "threads must be in 1..1024, got 0"),
    "isa": (dict(options=dict(isa="sse9")), "got 'sse9'"),
    "loss": (dict(options=dict(loss="hinge")), "got 'hinge'"),
    "top5": (
        dict(targets=np.zeros((6, 3), np.float32), options=dict(loss="mse", top5=True)),
        "top5 goes with",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    changes, message = BAD[name]
    case = broken(**changes)
    with pytest.raises(ValueError, match=message):
        engine.chain_sums(
            case["terms"], case["coefficients"], case["layers"], case["targets"], **case["options"]
        )


def test_outputs_must_be_writable_and_of_the_right_shape():
    case = make(6, (4, 3), 2, np.float32)
    out = np.zeros((2, 6, 3), np.float32)
    out.flags.writeable = False
    for bad, message in (
        (out, "writable"),
        (np.zeros((2, 6, 4), np.float32), r"must be \[2, 6, 3\]"),
        (np.zeros((2, 6, 3)), "float32"),
        (np.broadcast_to(np.zeros((1, 6, 3), np.float32), (2, 6, 3)), "writable"),
        (np.lib.stride_tricks.as_strided(out.copy(), strides=(0, 12, 4)), "must not overlap"),
        (np.lib.stride_tricks.as_strided(out.copy(), strides=(12, 12, 4)), "must not overlap"),
        (np.lib.stride_tricks.as_strided(out.copy(), strides=(72, 8, 4)), "must not overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.chain_outputs(case["terms"], case["coefficients"], case["layers"], bad)


def test_the_environment_forces_an_instruction_set():
    for isa in ISAS:
        assert python("print(e.kernel_names()[0])", MODECONN_ISA=isa).stdout.strip() == isa
    bad = python("e.kernel_names()", MODECONN_ISA="mmx")
    assert bad.returncode and "MODECONN_ISA must be one of" in bad.stderr and "'mmx'" in bad.stderr


def test_control_c_stops_within_a_second():
    code = """
import numpy as np, signal, threading, time, os
n = 512
f = lambda *s: np.zeros(s, np.float32)
layers = [dict(weights=[f(n, n)], coefficients=np.ones((500, 1))) for _ in range(10)]
def interrupt():
    global start
    start = time.process_time()
    os.kill(os.getpid(), signal.SIGINT)
threading.Timer(0.5, interrupt).start()
try:
    e.chain_sums([f(20000, n)], np.ones((500, 1)), layers, np.zeros(20000, np.int64), threads=2)
except KeyboardInterrupt:
    print("interrupted", time.process_time() - start)
"""
    done = python(code)
    # CPU seconds of two threads: other processes on the machine do not count.
    assert done.stdout.startswith("interrupted") and float(done.stdout.split()[1]) < 2, done
