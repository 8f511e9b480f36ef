"""Graphs of the engine's steps, drawn step by step, and the same in plain PyTorch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from native_chain_cases import ACTIVATIONS, DTYPES, PLAIN, combine, engine
from policy import assert_within_policy


class Net:
    """Draws a graph step by step; `values`: the shapes of the terms and of each step's rows."""

    def __init__(self, rows, shape, points=3, dtype="float32", seed=0):
        self.rng, self.rows, self.points, self.dtype = (
            np.random.default_rng(seed),
            rows,
            points,
            DTYPES[dtype],
        )
        self.terms = [self.draw(rows, *shape) for _ in range(2)]
        self.coefficients, self.layers, self.values = self.mix(2), [], [shape]

    def draw(self, *shape, scale=1.0):
        return (self.rng.standard_normal(shape) * scale).astype(self.dtype)

    def mix(self, k):
        return self.rng.standard_normal((self.points, k))

    def push(self, shape, **layer):
        self.layers.append(layer)
        self.values.append(shape)
        return len(self.layers) - 1

    def product(
        self, out, read=None, add=None, activation="relu", kernel=(3, 3), norm=False, **window
    ):
        shape = self.values[-1 if read is None else read + 1]
        image, groups = len(shape) == 3, window.get("groups", 1)
        size = (out, shape[0] // groups, *kernel) if image else (out, shape[0])
        scale = float(np.prod(size[1:])) ** -0.5
        more = dict(input=read, add=add, activation=activation, slope=0.125, **window)
        if norm:
            more |= dict(scale=self.mix(out), shift=self.mix(out))
        after = (out,)
        if image:
            probe = torch.zeros(1, *shape)
            after = tuple(F.conv2d(probe, torch.zeros(size), **window).shape[1:])
        return self.push(
            after,
            op="conv2d" if image else "linear",
            weights=[self.draw(*size, scale=scale) for _ in range(2)],
            biases=[self.draw(out) for _ in range(2)],
            coefficients=self.mix(2),
            **more,
        )

    def pool(self, op, kernel, read=None, **options):
        c, h, w = self.values[-1 if read is None else read + 1]
        f = F.max_pool2d if op == "max" else F.avg_pool2d
        window = {"ceil_mode" if key == "ceil" else key: value for key, value in options.items()}
        after = tuple(f(torch.zeros(1, c, h, w), kernel, **window).shape[1:])
        return self.push(after, op=f"{op}_pool2d", kernel=kernel, input=read, **options)

    def flatten(self, read=None):
        shape = self.values[-1 if read is None else read + 1]
        return self.push((int(np.prod(shape)),), op="flatten", input=read)

    def add(self, *inputs, activation="identity"):
        return self.push(
            self.values[inputs[0] + 1],
            op="add",
            inputs=list(inputs),
            activation=activation,
            slope=0.125,
        )

    def multiply(self, first, second, activation="identity"):
        return self.push(
            self.values[first + 1],
            op="multiply",
            inputs=[first, second],
            activation=activation,
            slope=0.125,
        )

    def affine(self, read=None, add=None, activation="identity"):
        shape = self.values[-1 if read is None else read + 1]
        return self.push(
            shape,
            op="affine",
            input=read,
            add=add,
            scale=self.mix(shape[0]),
            shift=self.mix(shape[0]),
            activation=activation,
            slope=0.125,
        )

    def group_norm(self, groups, read=None, eps=1e-5, activation="identity"):
        shape = self.values[-1 if read is None else read + 1]
        return self.push(
            shape,
            op="group_norm",
            input=read,
            groups=groups,
            eps=eps,
            scale=self.mix(shape[0]),
            shift=self.mix(shape[0]),
            activation=activation,
            slope=0.125,
        )

    def take(self, channels, read=None, activation="identity"):
        shape = self.values[-1 if read is None else read + 1]
        return self.push(
            (len(channels), *shape[1:]),
            op="take",
            input=read,
            channels=channels,
            activation=activation,
            slope=0.125,
        )

    def concat(self, *inputs, activation="identity"):
        shapes = [self.values[i + 1] for i in inputs]
        return self.push(
            (sum(shape[0] for shape in shapes), *shapes[0][1:]),
            op="concat",
            inputs=list(inputs),
            activation=activation,
            slope=0.125,
        )

    def more_terms(self, *shape, activation="identity"):
        terms = [self.draw(self.rows, *shape) for _ in range(3)]
        return self.push(
            shape,
            op="terms",
            terms=terms,
            coefficients=self.mix(3),
            activation=activation,
            slope=0.125,
        )

    def reference(self, dtype):
        tensor = lambda a: torch.from_numpy(np.array(a)).to(dtype)
        mixed = lambda arrays, c, t: combine([tensor(a) for a in arrays], c[t].tolist())
        outputs = []
        for t in range(self.points):
            values = [mixed(self.terms, self.coefficients, t)]
            for layer in self.layers:
                at = lambda key, layer=layer, values=values: (
                    values[-1] if layer.get(key) is None else values[layer[key] + 1]
                )
                op = layer["op"]
                per_channel = lambda key, x, t=t, layer=layer: tensor(layer[key][t]).reshape(
                    -1, *[1] * (x.ndim - 2)
                )
                more = 0 if layer.get("add") is None else values[layer["add"] + 1]
                if op == "terms":
                    y = mixed(layer["terms"], layer["coefficients"], t)
                elif op == "add":
                    y = sum(values[i + 1] for i in layer["inputs"])
                elif op == "multiply":
                    y = values[layer["inputs"][0] + 1] * values[layer["inputs"][1] + 1]
                elif op == "affine":
                    y = (
                        at("input") * per_channel("scale", at("input"))
                        + per_channel("shift", at("input"))
                        + more
                    )
                elif op == "group_norm":
                    x = at("input")
                    y = F.group_norm(x, layer["groups"], None, None, layer["eps"]) if len(x) else x
                    y = y * per_channel("scale", y) + per_channel("shift", y)
                elif op == "take":
                    x = at("input")
                    y = torch.cat([x, torch.zeros_like(x[:, :1])], 1)[:, layer["channels"]]
                elif op == "concat":
                    y = torch.cat([values[i + 1] for i in layer["inputs"]], dim=1)
                elif op == "flatten":
                    y = at("input").flatten(1)
                elif op.endswith("pool2d"):
                    pool = F.max_pool2d if op.startswith("max") else F.avg_pool2d
                    window = {key: layer[key] for key in ("stride", "padding") if key in layer}
                    y = pool(
                        at("input"), layer["kernel"], ceil_mode=layer.get("ceil", False), **window
                    )
                else:
                    w, b = (
                        mixed(layer[key], layer["coefficients"], t) for key in ("weights", "biases")
                    )
                    window = {
                        key: layer[key]
                        for key in ("stride", "padding", "dilation", "groups")
                        if key in layer
                    }
                    y = (
                        F.linear(at("input"), w, b)
                        if op == "linear"
                        else F.conv2d(at("input"), w, b, **window)
                    )
                    if "scale" in layer:
                        y = y * per_channel("scale", y) + per_channel("shift", y)
                    y = y + more
                values.append(ACTIVATIONS[layer.get("activation", "identity")](y))
            outputs.append(values[-1].flatten(1))
        return torch.stack(outputs)

    def outputs(self, isa, threads=1):
        out = np.full((self.points, self.rows, int(np.prod(self.values[-1]))), np.nan, self.dtype)
        engine.chain_outputs(
            self.terms, self.coefficients, self.layers, out, threads=threads, isa=isa
        )
        return out

    def check(self, isa, dtype, threads=1):
        plain, exact = (self.reference(precision) for precision in (PLAIN[dtype], torch.float64))
        got = self.outputs(isa, threads)
        assert_within_policy("outputs", got, plain, exact, PLAIN[dtype])
