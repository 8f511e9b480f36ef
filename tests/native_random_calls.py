"""Random calls of the C++ engine, for the sanitizers (tests/sanitize.py): good ones and bad ones.

    python tests/native_random_calls.py FILE [--calls 2000] [--at-once 1] [--seed 0]

Random graphs of steps, shapes, strides, dtypes, numbers of threads, no rows, no points, extreme
values; a third of the calls has an argument spoiled. A call ends with a result that does not depend
on the number of threads, or with an exception; whatever else it does is for a sanitizer to see.
numpy alone: PyTorch is not instrumented, and brings threads of its own.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

# What a bad argument ends with; RuntimeError is pybind11's for a value of another type.
REFUSED = (ValueError, TypeError, RuntimeError)
EXTREMES = (0.0, -0.0, 1e-45, -1e-39, 1e20, -3e38, 3e38, np.inf, -np.inf, np.nan)
_SPOILED = 3  # every so many calls one
Call = dict[str, Any]


def load(file: str) -> Any:
    """Returns the engine, from its file: `import modeconn` would import torch."""
    spec = importlib.util.spec_from_file_location("modeconn._native", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Draw:
    """Draws one call, a step after the other; `shapes` are those of the terms and each step."""

    def __init__(self, engine: Any, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = [np.float32, np.float64][self.integer(0, 2)]
        self.rows = self.one_of(0, 1, 2, 7, 33, 70)
        self.points = self.one_of(0, 1, 2, 3, 9)
        self.activations = engine.activations()
        self.extreme = self.chance(0.2)
        self.image = self.chance(0.5)
        self.flat = False
        width = self.integer(1, 20)
        size = (self.integer(1, 9), self.integer(1, 9))
        shape = (width, *size) if self.image else (self.one_of(width, width, 300),)
        count = self.integer(1, 4)
        self.shapes: list[tuple[int, ...]] = [shape]
        self.layers: list[Call] = []
        self.call: Call = {
            "terms": [self.array(self.rows, *shape) for _ in range(count)],
            "coefficients": self.mix(count),
            "layers": self.layers,
            "activation": self.one_of("identity", *self.activations),
            "slope": 0.125,
            "threads": self.integer(1, 5),
            "isa": self.one_of(*engine.isas()),
        }

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def one_of(self, *values: Any) -> Any:
        return values[self.integer(0, len(values))]

    def values(self, *shape: int) -> np.ndarray:
        drawn = self.rng.standard_normal(shape).astype(self.dtype)
        if self.extreme and drawn.size and self.chance(0.3):
            drawn.reshape(-1)[self.integer(0, drawn.size)] = self.one_of(*EXTREMES)
        return drawn

    def array(self, *shape: int) -> np.ndarray:
        """An array whose rows lie one after the other, apart, backwards, or on each other."""
        drawn = self.values(*shape)
        kind = self.integer(0, 5)
        if kind == 0 and shape[0]:
            row = int(np.prod(shape[1:]))
            store = np.full((shape[0], row + 3), np.nan, self.dtype)
            store[:, 1 : row + 1] = drawn.reshape(shape[0], row)
            strides = (store.strides[0], *drawn.strides[1:])
            return np.lib.stride_tricks.as_strided(store[:, 1:], shape, strides)
        if kind == 1:
            return drawn[::-1]
        if kind == 2 and shape[0]:
            return np.broadcast_to(drawn[:1], shape)
        return drawn

    def mix(self, count: int) -> np.ndarray:
        """Coefficients [points, count], some of them 0 and 1."""
        drawn = self.rng.standard_normal((self.points, count))
        drawn[self.rng.random(drawn.shape) < 0.3] = 0
        drawn[self.rng.random(drawn.shape) < 0.1] = 1
        return drawn

    def place(self, fits: Callable[[tuple[int, ...]], bool]) -> int:
        """The step, -1 for the terms, of some value that fits; the last is the likeliest."""
        found = [i - 1 for i, shape in enumerate(self.shapes) if fits(shape)]
        return found[-1] if self.chance(0.5) else self.one_of(*found)

    def alike(self, shape: tuple[int, ...]) -> int:
        return self.place(lambda other: other == shape)

    def push(self, shape: tuple[int, ...], op: str, **more: Any) -> None:
        activation = {"activation": self.one_of(*self.activations), "slope": 0.125}
        bare = op.endswith("pool2d") or op == "flatten"
        self.layers.append({"op": op, **more, **({} if bare else activation)})
        self.shapes.append(shape)

    # -- steps -------------------------------------------------------------------------------------

    def step(self, norms: bool) -> None:
        """Adds a step that reads a value of the kind that the last one has."""
        dims = len(self.shapes[-1])
        read = self.place(lambda shape: len(shape) == dims)
        shape = self.shapes[read + 1]
        own = [self.product, self.add, self.affine, self.group_norm, self.take, self.concat]
        own += [self.product, self.multiply, self.more_terms]
        own += [self.pool] if dims == 3 else []
        own += [self.batch_norm] * 4 if norms and self.rows * int(np.prod(shape[1:])) > 1 else []
        self.one_of(*own)(read, shape)

    def product(self, read: int, shape: tuple[int, ...]) -> None:
        add = self.alike(shape) if self.chance(0.3) else None
        units, count = self.one_of(1, 3, 13, 30), self.integer(1, 3)
        more: Call = {"input": read, "coefficients": self.mix(count)}
        if len(shape) == 1:
            units = shape[0] if add is not None else units
            size, after = (units, shape[0]), (units,)
        else:
            groups = self.one_of(*(g for g in (1, 1, 2, 3) if shape[0] % g == 0))
            units = shape[0] if add is not None else units * groups
            kernel = [1, 1] if min(shape[1:]) < 3 and add is None else [3, 3]
            same = [k // 2 for k in kernel]
            after = (units, *shape[1:])
            more |= {"groups": groups, "padding": same}
            if add is None and self.chance(0.3):
                more["stride"] = [self.integer(1, 3), self.integer(1, 3)]
                after = (units, *((n - 1) // s + 1 for n, s in zip(shape[1:], more["stride"])))
            size = (units, shape[0] // groups, *kernel)
        more["weights"] = [self.array(*size) for _ in range(count)]
        if self.chance(0.7):
            more["biases"] = [self.values(units) for _ in range(count)]
        if self.chance(0.3):
            more |= {"scale": self.mix(units), "shift": self.mix(units)}
        self.push(after, "linear" if len(shape) == 1 else "conv2d", add=add, **more)

    def add(self, read: int, shape: tuple[int, ...]) -> None:
        inputs = [read, *(self.alike(shape) for _ in range(self.integer(0, 3)))]
        self.push(shape, "add", inputs=inputs)

    def multiply(self, read: int, shape: tuple[int, ...]) -> None:
        gate = (shape[0], *(1 for _ in shape[1:]))
        second = self.place(lambda other: other in (shape, gate))
        self.push(shape, "multiply", inputs=[read, second])

    def affine(self, read: int, shape: tuple[int, ...]) -> None:
        factors = {"scale": self.mix(shape[0]), "shift": self.mix(shape[0])}
        self.push(shape, "affine", input=read, add=self.alike(shape), **factors)

    def batch_norm(self, read: int, shape: tuple[int, ...]) -> None:
        factors = {"scale": self.mix(shape[0]), "shift": self.mix(shape[0]), "eps": 1e-5}
        self.push(shape, "batch_norm", input=read, **factors)

    def group_norm(self, read: int, shape: tuple[int, ...]) -> None:
        groups = self.one_of(*(g for g in range(1, shape[0] + 1) if shape[0] % g == 0))
        factors = {"scale": self.mix(shape[0]), "shift": self.mix(shape[0]), "eps": 1e-5}
        self.push(shape, "group_norm", input=read, groups=groups, **factors)

    def take(self, read: int, shape: tuple[int, ...]) -> None:
        channels = self.rng.integers(-1, shape[0], self.integer(1, 8)).tolist()
        self.push((len(channels), *shape[1:]), "take", input=read, channels=channels)

    def concat(self, read: int, shape: tuple[int, ...]) -> None:
        others = [
            self.place(lambda other: other[1:] == shape[1:] and len(other) == len(shape))
            for _ in range(self.integer(0, 3))
        ]
        channels = sum(self.shapes[i + 1][0] for i in (read, *others))
        self.push((channels, *shape[1:]), "concat", inputs=[read, *others])

    def more_terms(self, read: int, shape: tuple[int, ...]) -> None:
        terms = [self.array(self.rows, *shape) for _ in range(2)]
        self.push(shape, "terms", terms=terms, coefficients=self.mix(2))

    def pool(self, read: int, shape: tuple[int, ...]) -> None:
        kernel = [min(size, self.integer(1, 4)) for size in shape[1:]]
        stride = [self.integer(1, 4), self.integer(1, 4)]
        after = ((n - k) // s + 1 for n, k, s in zip(shape[1:], kernel, stride))
        op = self.one_of("max_pool2d", "avg_pool2d")
        self.push((shape[0], *after), op, input=read, kernel=kernel, stride=stride)

    def flatten(self) -> None:
        self.push((int(np.prod(self.shapes[-1])),), "flatten")

    # -- the whole call ----------------------------------------------------------------------------

    def finish(self, kind: str) -> Call:
        """Draws the steps, and what a kind of call takes beside them."""
        for _ in range(self.integer(0, 6)):
            self.step(kind == "chain_statistics")
        if self.image and self.layers:
            self.flatten()
            for _ in range(self.integer(0, 3)):
                self.step(kind == "chain_statistics")
        width = int(np.prod(self.shapes[-1]))
        if kind == "chain_outputs":
            pad = self.integer(0, 3)
            store = np.full((self.points, self.rows, width + pad), np.nan, self.dtype)
            if self.chance(0.2):
                store = store.transpose(1, 0, 2).copy().transpose(1, 0, 2)
            self.call |= {"out": store[:, :, :width]}
        elif kind == "chain_sums":
            loss = self.one_of("cross_entropy", "cross_entropy", "mse", "bce")
            labels = self.rng.integers(0, width, self.rows)
            targets = labels if loss == "cross_entropy" else self.array(self.rows, width)
            top5 = loss == "cross_entropy" and self.chance(0.5)
            self.call |= {"targets": targets, "loss": loss, "top5": top5}
        return self.call

    # -- bad arguments -----------------------------------------------------------------------------

    def spoil(self, call: Call) -> None:
        """Makes one argument of the call, or of one of its steps, another."""
        place: Any = self.one_of(call, *call["layers"], *call["layers"])
        if not place:
            return
        key = self.one_of(*place)
        value = place[key]
        if isinstance(value, list) and value and self.chance(0.8):
            place, key = value, self.integer(0, len(value))
            value = place[key]
        if isinstance(value, np.ndarray) and self.chance(0.9):
            place[key] = self.changed(value)
        elif isinstance(place, dict) and self.chance(0.2):
            place["unknown"] = 1
        elif isinstance(place, dict) and place is not call and self.chance(0.3):
            del place[key]
        else:
            place[key] = self.one_of(None, -7, 0, 1 << 40, "swish", [], [1, 2], 1.5, {}, 2, "")

    def changed(self, a: np.ndarray) -> Any:
        """An array of another dtype, shape, or layout, or with a number that does not belong."""
        kind = self.integer(0, 9)
        if kind == 0:
            return a.astype(self.one_of(np.float16, np.int32, np.float32, np.float64, ">f8"))
        if kind == 1:
            return a[: self.integer(0, len(a) + 1)] if a.ndim else a
        if kind == 2:
            return a[..., :-1]
        if kind == 3:
            return np.repeat(a, 2, axis=-1)[..., ::2]  # not contiguous in its last dimension
        if kind == 4:
            return a.T
        if kind == 5:
            return a[None]
        if kind == 6:
            raw = np.zeros(a.nbytes + 1, np.uint8)[1:]
            return raw.view(a.dtype).reshape(a.shape)  # no element at a multiple of its size
        if kind == 7:
            return np.broadcast_to(a[:1], a.shape) if a.ndim and len(a) else a
        spoiled = np.array(a)
        if spoiled.size:
            spoiled.reshape(-1)[self.integer(0, spoiled.size)] = self.one_of(-1, 1 << 30, 7)
        return spoiled


def run(engine: Any, kind: str, call: Call) -> bytes:
    """Makes a call; returns what came out."""
    given = dict(call)
    places = {"chain_outputs": ["out"], "chain_sums": ["targets"]}.get(kind, [])
    names = ["terms", "coefficients", "layers", *places]
    first = [given.pop(name) for name in names]
    result = getattr(engine, kind)(*first, **given)
    return bytes(call["out"].tobytes() if result is None else result.tobytes())


def one(engine: Any, seed: int) -> str:
    """Draws one call and makes it; says what came of it."""
    draw = Draw(engine, seed)
    kind = draw.one_of("chain_outputs", "chain_sums", "chain_sums", "chain_statistics")
    call = draw.finish(kind)
    spoiled = seed % _SPOILED == 0
    try:
        if spoiled:
            draw.spoil(call)
            run(engine, kind, call)
            return "spoiled, and taken"
        first = run(engine, kind, call)
    except REFUSED as error:
        statistics = "must have a batch_norm" in str(error)
        if not (spoiled or statistics):
            raise AssertionError(f"seed {seed}: a good call of {kind} was refused") from error
        return "refused"
    again = run(engine, kind, {**copy.copy(call), "threads": 1 + call["threads"] % 4})
    assert first == again, f"seed {seed}: {kind} depends on the number of threads"
    return "good"


def calls(engine: Any, count: int, at_once: int = 1, seed: int = 0) -> Counter[str]:
    """Makes random calls, some of them at the same time; counts what came of them."""
    if at_once == 1:
        return Counter(one(engine, seed + i) for i in range(count))
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(at_once) as pool:
            seeds = range(seed, seed + count)
            return Counter(pool.map(one, itertools.repeat(engine), seeds))
    finally:
        sys.setswitchinterval(before)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="random calls of the C++ engine")
    parser.add_argument("file", help="the extension, modeconn/_native….so")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=1, help="threads of Python")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    counts = calls(load(given.file), given.calls, given.at_once, given.seed)
    print(f"{given.calls} random calls, {given.at_once} at a time: {dict(counts)}")


if __name__ == "__main__":
    main()
