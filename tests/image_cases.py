"""Chains that begin with images, drawn layer by layer, and the same in plain PyTorch."""

import numpy as np
import torch
import torch.nn.functional as F

from native_chain_cases import ACTIVATIONS, DTYPES, PLAIN, combine
from native_chain_cases import outputs as chain_outputs
from policy import assert_within_policy


def reference(case, dtype):
    """The chain's outputs [T, N, values] by plain PyTorch at this precision."""

    def tensor(a):
        return torch.from_numpy(np.array(a)).to(dtype)

    outputs = []
    for t in range(len(case["coefficients"])):
        x = ACTIVATIONS[case["activation"]](
            combine([tensor(v) for v in case["terms"]], case["coefficients"][t].tolist())
        )
        for layer in case["layers"]:
            op = layer.get("op", "linear")
            if op == "flatten":
                x = x.flatten(1)
            elif op == "max_pool2d":
                x = F.max_pool2d(x, layer["kernel"], layer.get("stride"), layer.get("padding", 0))
            elif op == "avg_pool2d":
                x = F.avg_pool2d(x, layer["kernel"], layer.get("stride"), layer.get("padding", 0))
            else:
                w = combine(
                    [tensor(v) for v in layer["weights"]], layer["coefficients"][t].tolist()
                )
                cb = layer.get("bias_coefficients", layer["coefficients"])[t].tolist()
                b = (
                    combine([tensor(v) for v in layer["biases"]], cb)
                    if layer.get("biases")
                    else None
                )
                x = (
                    F.linear(x, w, b)
                    if op == "linear"
                    else F.conv2d(x, w, b, layer.get("stride", 1), layer.get("padding", 0))
                )
                if "scale" in layer:
                    scale, shift = (
                        tensor(layer[key][t]).reshape(-1, *[1] * (x.ndim - 2))
                        for key in ("scale", "shift")
                    )
                    x = x * scale + shift
                x = ACTIVATIONS[layer.get("activation", "identity")](x)
        outputs.append(x.flatten(1))
    return torch.stack(outputs)


class Maker:
    """Draws a case layer by layer."""

    def __init__(self, rows, image, points, dtype, terms=2, first="identity", pad=0, seed=0):
        self.rng, self.dtype, self.points = np.random.default_rng(seed), DTYPES[dtype], points
        self.channels = image[0]
        self.case = {
            "terms": [self.strided(rows, *image, pad=pad) for _ in range(terms)],
            "coefficients": self.mix(terms),
            "layers": [],
            "activation": first,
        }

    def draw(self, *shape, scale=1.0):
        return (self.rng.standard_normal(shape) * scale).astype(self.dtype)

    def strided(self, rows, *rest, pad=0, scale=1.0):
        """Rows with a gap of `pad` elements behind each, starting beside an aligned address."""
        n = int(np.prod(rest))
        store = np.full((rows, n + pad), np.nan, self.dtype)
        store[:, pad and 1 : n + (pad and 1)] = self.draw(rows, n, scale=scale)
        size = store.itemsize
        strides = [int(np.prod(rest[i + 1 :])) * size for i in range(len(rest))]
        return np.lib.stride_tricks.as_strided(
            store[:, pad and 1 :], (rows, *rest), ((n + pad) * size, *strides)
        )

    def mix(self, k):
        c = self.rng.standard_normal((self.points, k))
        c[:1] = np.eye(1, k)
        return c

    def conv(
        self,
        out,
        kernel=(3, 3),
        stride=(1, 1),
        padding=(0, 0),
        activation="relu",
        blocks=2,
        bias=True,
        pad=0,
        norm=False,
    ):
        scale = (self.channels * kernel[0] * kernel[1]) ** -0.5
        layer = {
            "op": "conv2d",
            "weights": [
                self.strided(out, self.channels, *kernel, pad=pad, scale=scale)
                for _ in range(blocks)
            ],
            "biases": [self.draw(out) for _ in range(blocks)] if bias else None,
            "coefficients": self.mix(blocks),
            "stride": stride,
            "padding": padding,
            "activation": activation,
            "slope": 0.125,
        }
        if norm:
            layer.update(
                scale=self.rng.standard_normal((self.points, out)),
                shift=self.rng.standard_normal((self.points, out)),
            )
        return self.add(out, layer)

    def pool(self, op, kernel, **options):
        return self.add(self.channels, dict(op=f"{op}_pool2d", kernel=kernel, **options))

    def flatten(self, size):
        return self.add(size, {"op": "flatten"})

    def linear(self, out, activation="identity", blocks=2):
        return self.add(
            out,
            {
                "weights": [
                    self.draw(out, self.channels, scale=self.channels**-0.5) for _ in range(blocks)
                ],
                "biases": [self.draw(out) for _ in range(blocks)],
                "coefficients": self.mix(blocks),
                "activation": activation,
            },
        )

    def add(self, channels, layer):
        self.channels = channels
        self.case["layers"].append(layer)
        return self


def outputs(case, isa, threads=1, pad=3):
    """What the engine gives, and what is exact."""
    want = reference(case, torch.float64)
    return chain_outputs(case, isa, threads, pad, width=want.shape[2]), want


def check(maker, isa, dtype, **options):
    got, want = outputs(maker.case, isa, **options)
    plain = reference(maker.case, PLAIN[dtype])
    assert_within_policy("outputs", got, plain, want, PLAIN[dtype])


def vgg(rows, image, points, dtype, **options):
    """conv-relu-pool-conv-relu-flatten-linear."""
    _, h, w = image
    return (
        Maker(rows, image, points, dtype, **options)
        .conv(7, padding=(1, 1))
        .pool("max", (2, 2))
        .conv(17, padding=(1, 1))
        .flatten(17 * (h // 2) * (w // 2))
        .linear(5)
    )
