"""Many subnetworks of equal shape as one: their weights stacked, their logits from one set of batched products."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.connection.chain import Chain, Layer
from modeconn.connection.subnetworks import Subnetwork, restrict
from modeconn.errors import ModeconnError

# Kept features of all subnetworks are gathered once if they take up no more than this, else batch
# by batch.
_MEMORY_BUDGET = 3 << 30
# Rows that are gathered at a time.
_BLOCK = 4096
# Widths inside a stack are rounded up to a multiple of this: batched products of odd sizes take up
# to twice the time (16 products of 256 × 122 by 122 × 123 with MKL on an AVX2 CPU: 30 to 46
# GFLOP/s, of 128 by 128 50 to 63).
_MULTIPLE = 16


class Stack:
    """D subnetworks whose weights have equal shapes.

    Hidden widths of linear layers are padded with units whose weights and biases are zero. Their
    values are zero, so that their gradients are, and they stay what they are.

    Attributes:
        weights, biases: of layer after layer, [D, …], padded; leaves that take gradients.
        entry: an entry layer whose following layers are like those of every subnetwork.
    """

    def __init__(self, chain: Chain, subs: Sequence[Subnetwork]) -> None:
        check_stackable(chain, subs)
        self.chain, self.entry = chain, subs[0].entry
        self.weights = [
            torch.stack([sub.weights[i] for sub in subs]) for i in range(len(subs[0].weights))
        ]
        self.biases: list[Tensor | None] = []
        for i, bias in enumerate(subs[0].biases):
            several = [each for each in (sub.biases[i] for sub in subs) if each is not None]
            self.biases.append(None if bias is None else torch.stack(several))
        self._pad()
        self._take_gradients()

    def __len__(self) -> int:
        return len(self.weights[0])

    @property
    def parameters(self) -> list[Tensor]:
        """All weights and biases, in a fixed order."""
        return [*self.weights, *(bias for bias in self.biases if bias is not None)]

    def keep(self, which: Tensor) -> None:
        """Leave only some of the subnetworks, in new leaves."""
        self.weights = [weight.detach()[which] for weight in self.weights]
        self.biases = [None if bias is None else bias.detach()[which] for bias in self.biases]
        self._take_gradients()

    def subnetwork(self, d: int, like: Subnetwork) -> Subnetwork:
        """A copy of the d-th subnetwork as it is now, with the entry, kept units and widths of another."""
        weights = tuple(_cut(weight[d], old) for weight, old in zip(self.weights, like.weights))
        biases = tuple(
            None if bias is None or old is None else _cut(bias[d], old)
            for bias, old in zip(self.biases, like.biases)
        )
        return Subnetwork(like.entry, like.kept, weights, biases)

    def logits(self, h: Tensor | list[Tensor]) -> Tensor:
        """Logits [D, B, C] from kept features: [D, B, k], or one tensor [B, channels, …] for each subnetwork."""
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            layer = self.chain.layer(self.entry + 1 + i)
            if layer.kind == "linear":
                h = torch.stack(h) if isinstance(h, list) else h
                columns = weight.transpose(1, 2)
                h = (
                    torch.bmm(h, columns)
                    if bias is None
                    else torch.baddbmm(bias[:, None], h, columns)
                )
                h = h if i == last else _finish(layer, h)
            else:
                # A convolution each: grouped ones are slower on a CPU. unbind, since its gradient
                # is one stack.
                own = [None] * len(h) if bias is None else bias.unbind()
                h = [
                    _finish(layer, layer.map(part, w, b))
                    for part, w, b in zip(h, weight.unbind(), own)
                ]
        if isinstance(h, list):
            raise ModeconnError("the last layer of a subnetwork must be linear")
        return h

    def _pad(self) -> None:
        """Round the widths between linear layers up, and the width of the features if a linear layer reads them."""
        layers = [self.chain.layer(self.entry + 1 + i) for i in range(len(self.weights))]
        padded = layers[0].kind == "linear"
        for i, layer in enumerate(layers):
            outputs = (
                i < len(layers) - 1
                and layers[i + 1].kind == layer.kind == "linear"
                and _keeps_zero(layer)
            )
            if layer.kind == "linear":
                rows, columns = self.weights[i].shape[1:]
                more = (_padding(columns) if padded else 0, _padding(rows) if outputs else 0)
                bias = self.biases[i]
                self.weights[i] = F.pad(self.weights[i], (0, more[0], 0, more[1]))
                self.biases[i] = None if bias is None else F.pad(bias, (0, more[1]))
            padded = outputs

    def _take_gradients(self) -> None:
        self.weights = [weight.detach().clone().requires_grad_() for weight in self.weights]
        self.biases = [
            None if bias is None else bias.detach().clone().requires_grad_() for bias in self.biases
        ]


def _padding(width: int) -> int:
    return -width % _MULTIPLE


def _padded(h: Tensor) -> Tensor:
    """Features [..., k] with zeros up to the width that a padded layer reads."""
    return F.pad(h, (0, _padding(h.shape[-1]))) if h.shape[-1] % _MULTIPLE else h


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a tensor without its padding."""
    return tensor.detach()[tuple(map(slice, like.shape))].clone()


def _keeps_zero(layer: Layer) -> bool:
    """Whether what follows an affine map takes 0 to 0, so that padded units do not count."""
    return not bool(_finish(layer, torch.zeros(1, 1, 1)).any())


class Rows:
    """The kept features of a stack's subnetworks, batch by batch, padded as the stack's first layer is.

    Args:
        features: h_l of each subnetwork [N, …]; all units, or the kept ones alone.
    """

    def __init__(
        self,
        chain: Chain,
        subs: Sequence[Subnetwork],
        features: Sequence[Tensor],
        budget: int = _MEMORY_BUDGET,
    ) -> None:
        self.linear = chain.layer(subs[0].entry + 1).kind == "linear"
        self._chain, self._subs, self._features = chain, list(subs), list(features)
        size = sum(
            f[0].numel() * len(s.kept) // chain.widths[s.entry] for s, f in zip(subs, features)
        ) * len(features[0])
        same = all(f is features[0] for f in features) and all(
            torch.equal(s.kept, subs[0].kept) for s in subs
        )
        self._together = same  # every subnetwork reads the same numbers
        self._ready = same or size * features[0].element_size() <= budget
        self._table: Tensor | None = None
        if self._ready and self.linear and not same:
            self._table = self._tabled()
        elif self._ready:
            count = 1 if same else len(subs)
            self._features = [self._picked(d, self._features[d]) for d in range(count)]

    def keep(self, which: Sequence[int]) -> None:
        """Leave only some of the subnetworks."""
        self._subs = [self._subs[d] for d in which]
        if self._table is not None:
            self._table = self._table[:, torch.tensor(which, device=self._table.device)]
        elif not self._together:
            self._features = [self._features[d] for d in which]

    def batch(self, rows: Tensor | slice) -> Tensor | list[Tensor]:
        """Some rows as `Stack.logits` takes them."""
        if self._together:
            h = _padded(self._features[0][rows]) if self.linear else self._features[0][rows]
            return h.expand(len(self._subs), *h.shape) if self.linear else [h] * len(self._subs)
        if self._table is not None:
            return self._table[rows].transpose(0, 1)
        parts = [
            f[rows] if self._ready else self._picked(d, f[rows])
            for d, f in enumerate(self._features)
        ]
        return _padded(torch.stack(parts)) if self.linear else parts

    def _tabled(self) -> Tensor:
        """The kept features of all subnetworks, [N, D, k]: a sample's are next to each other, so one gather takes them all."""
        first = _padded(self._picked(0, self._features[0][:1]))
        table = first.new_empty(len(self._features[0]), len(self._subs), first.shape[1])
        for d, h in enumerate(self._features):
            for start in range(0, len(h), _BLOCK):
                table[start : start + _BLOCK, d] = _padded(
                    self._picked(d, h[start : start + _BLOCK])
                )
        self._features = []
        return table

    def _picked(self, d: int, h: Tensor) -> Tensor:
        sub = self._subs[d]
        layer = self._chain.layer(sub.entry + 1)
        whole = h.shape[1] == self._chain.widths[sub.entry] * (
            layer.block if layer.kind == "linear" else 1
        )
        h = restrict(self._chain, sub.entry, h, sub.kept) if whole else h
        return h.contiguous(memory_format=torch.channels_last) if h.dim() == 4 else h.contiguous()


def _finish(layer: Layer, h: Tensor) -> Tensor:
    """The steps after an affine map, a ReLU after a max pooling that follows it: the same numbers, fewer of them."""
    steps = [step for step in layer.steps if step.op != "batch_norm"]
    for i, (step, after) in enumerate(itertools.pairwise(steps)):
        if step.op == "relu" and after.op == "max_pool2d":
            steps[i], steps[i + 1] = after, step
    for step in steps:
        h = step.run([h], [], len(h))
    return h


def check_stackable(chain: Chain, subs: Sequence[Subnetwork]) -> None:
    """Raise a ModeconnError unless subnetworks have equal shapes and the layers they stand for act alike."""
    if not subs:
        raise ModeconnError("there are no subnetworks to train")

    def kind(sub: Subnetwork) -> list[object]:
        layers = chain.layers[sub.entry : sub.entry + len(sub.weights)]
        shapes = [(tuple(w.shape), b is not None) for w, b in zip(sub.weights, sub.biases)]
        # What follows the readout's layer in the chain does not act on the readout.
        acts = [
            (
                x.kind,
                [step.op for step in x.steps if step.op != "batch_norm"],
                str(x.affine.args[3:]),
            )
            for x in layers[:-1]
        ]
        return [
            len(sub.kept),
            shapes,
            acts,
            sub.entry if chain.layer(sub.entry + 1).kind != "linear" else "linear",
        ]

    first = kind(subs[0])
    for sub in subs[1:]:
        if kind(sub) != first:
            raise ModeconnError(
                f"subnetworks that are trained together must have equal shapes: that of entry layer {subs[0].entry} has widths "
                f"{list(subs[0].widths)} on {len(subs[0].kept)} units, that of entry layer {sub.entry} {list(sub.widths)} on "
                f"{len(sub.kept)}"
            )
