"""Stacks many subnetworks of equal shape: one set of batched products gives all their logits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from modeconn.connection.layer_chain import AffineLayer, LayerChain
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

    def __init__(self, chain: LayerChain, subs: Sequence[Subnetwork]) -> None:
        check_stackable(chain, subs)
        self.chain, self.entry = chain, subs[0].entry
        layers = range(len(subs[0].weights))
        self.weights = [_stacked(subs, i) for i in layers]
        self.biases = [_stacked_biases(subs, i) for i in layers]
        self._pad()
        self._take_gradients()

    def __len__(self) -> int:
        return len(self.weights[0])

    @property
    def parameters(self) -> list[Tensor]:
        """All weights and biases, in a fixed order."""
        return [*self.weights, *(bias for bias in self.biases if bias is not None)]

    def keep(self, which: Tensor) -> None:
        """Keeps only some of the subnetworks, in new leaves."""
        self.weights = [weight.detach()[which] for weight in self.weights]
        self.biases = [None if bias is None else bias.detach()[which] for bias in self.biases]
        self._take_gradients()

    def subnetwork(self, d: int, like: Subnetwork) -> Subnetwork:
        """Copies the d-th subnetwork, with the entry layer, kept units and widths of another."""
        weights = tuple(_cut(weight[d], old) for weight, old in zip(self.weights, like.weights))
        biases = tuple(
            None if bias is None or old is None else _cut(bias[d], old)
            for bias, old in zip(self.biases, like.biases)
        )
        return Subnetwork(like.entry, like.kept, weights, biases)

    def logits(self, h: Tensor | list[Tensor]) -> Tensor:
        """Computes logits [D, B, C] from kept features.

        Args:
            h: [D, B, k], or one tensor [B, channels, …] for each subnetwork.
        """
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            layer = self.chain.layer(self.entry + 1 + i)
            if layer.kind == "linear":
                h = torch.stack(h) if isinstance(h, list) else h
                h = _batched_linear(h, weight, bias)
                h = h if i == last else _finish(layer, h)
            else:
                # A convolution each: grouped ones are slower on a CPU. unbind, since its gradient
                # is one stack.
                own = [None] * len(h) if bias is None else bias.unbind()
                h = [
                    _finish(layer, layer.map(part, w, b))
                    for part, w, b in zip(h, weight.unbind(), own)
                ]
        if isinstance(h, list):  # the channels of a last convolution, averaged
            if any(part.dim() != 2 for part in h):
                raise ModeconnError("the last layer of a subnetwork must give [N, classes]")
            return torch.stack(h)
        return h

    def _pad(self) -> None:
        """Rounds up the widths between linear layers, and that of the features before one."""
        layers = [self.chain.layer(self.entry + 1 + i) for i in range(len(self.weights))]
        padded = layers[0].kind == "linear"
        for i, layer in enumerate(layers):
            inner = i < len(layers) - 1 and layers[i + 1].kind == layer.kind == "linear"
            outputs = inner and _keeps_zero(layer)
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


def _stacked(subs: Sequence[Subnetwork], i: int) -> Tensor:
    return torch.stack([sub.weights[i] for sub in subs])


def _stacked_biases(subs: Sequence[Subnetwork], i: int) -> Tensor | None:
    """Stacks the biases of the i-th layer; None where it has none."""
    biases = [sub.biases[i] for sub in subs]
    return None if biases[0] is None else torch.stack([b for b in biases if b is not None])


def _batched_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    columns = weight.transpose(1, 2)
    if bias is None:
        return torch.bmm(h, columns)
    return torch.baddbmm(bias[:, None], h, columns)


def _padding(width: int) -> int:
    return -width % _MULTIPLE


def _padded(h: Tensor) -> Tensor:
    """Pads features [..., k] with zeros up to the width that a padded layer reads."""
    return F.pad(h, (0, _padding(h.shape[-1]))) if h.shape[-1] % _MULTIPLE else h


def _cut(tensor: Tensor, like: Tensor) -> Tensor:
    """Copies a tensor without its padding."""
    return tensor.detach()[tuple(map(slice, like.shape))].clone()


def _keeps_zero(layer: AffineLayer) -> bool:
    """Whether what follows an affine map takes 0 to 0, so that padded units do not count."""
    return not bool(_finish(layer, torch.zeros(1, 1, 1)).any())


class KeptFeatures:
    """Gives the kept features of a stack's subnetworks, padded as the stack's first layer is.

    Args:
        features: h_l of each subnetwork [N, …]; all units, or the kept ones alone.
    """

    def __init__(
        self,
        chain: LayerChain,
        subs: Sequence[Subnetwork],
        features: Sequence[Tensor],
        budget: int = _MEMORY_BUDGET,
    ) -> None:
        self.linear = chain.layer(subs[0].entry + 1).kind == "linear"
        self._chain, self._subs, self._features = chain, list(subs), list(features)
        same_features = all(f is features[0] for f in features)
        same = same_features and all(torch.equal(s.kept, subs[0].kept) for s in subs)
        self._together = same  # every subnetwork reads the same numbers
        self._ready = same or self._bytes() <= budget
        self._table: Tensor | None = None
        if self._ready and self.linear and not same:
            self._table = self._tabled()
        elif self._ready:
            count = 1 if same else len(subs)
            self._features = [self._picked(d, self._features[d]) for d in range(count)]

    def _bytes(self) -> int:
        """Bytes of the kept features of all subnetworks."""
        of_a_sample = 0
        for sub, h in zip(self._subs, self._features):
            of_a_sample += h[0].numel() * len(sub.kept) // self._chain.widths[sub.entry]
        return of_a_sample * len(self._features[0]) * self._features[0].element_size()

    def keep(self, which: Sequence[int]) -> None:
        """Keeps only some of the subnetworks."""
        self._subs = [self._subs[d] for d in which]
        if self._table is not None:
            self._table = self._table[:, torch.tensor(which, device=self._table.device)]
        elif not self._together:
            self._features = [self._features[d] for d in which]

    def batch(self, rows: Tensor | slice) -> Tensor | list[Tensor]:
        """Returns some rows as `Stack.logits` takes them."""
        if self._together:
            h = _padded(self._features[0][rows]) if self.linear else self._features[0][rows]
            return h.expand(len(self._subs), *h.shape) if self.linear else [h] * len(self._subs)
        if self._table is not None:
            return self._table[rows].transpose(0, 1)
        parts = [f[rows] for f in self._features]
        if not self._ready:
            parts = [self._picked(d, part) for d, part in enumerate(parts)]
        return _padded(torch.stack(parts)) if self.linear else parts

    def _tabled(self) -> Tensor:
        """Returns the kept features of all subnetworks, [N, D, k].

        Those of a sample are next to each other, so one gather takes them all.
        """
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
        """Restricts features to the units that a subnetwork keeps, unless they are so already."""
        sub = self._subs[d]
        layer = self._chain.layer(sub.entry + 1)
        block = layer.block if layer.kind == "linear" else 1
        if h.shape[1] == self._chain.widths[sub.entry] * block:
            h = restrict(self._chain, sub.entry, h, sub.kept)
        return h.contiguous(memory_format=torch.channels_last) if h.dim() == 4 else h.contiguous()


def _finish(layer: AffineLayer, h: Tensor) -> Tensor:
    """Applies the steps after an affine map, max pooling before a ReLU.

    The two commute; the ReLU then has fewer numbers to do.
    """
    steps = [step for step in layer.steps if step.op != "batch_norm"]
    for i, (step, after) in enumerate(itertools.pairwise(steps)):
        if step.op == "relu" and after.op == "max_pool2d":
            steps[i], steps[i + 1] = after, step
    for step in steps:
        h = step.run([h], [], len(h))
    return h


def check_stackable(chain: LayerChain, subs: Sequence[Subnetwork]) -> None:
    """Raises unless subnetworks have equal shapes and the layers they stand for act alike."""
    if not subs:
        raise ModeconnError("there are no subnetworks to train")

    first = _signature(chain, subs[0])
    for sub in subs[1:]:
        if _signature(chain, sub) != first:
            raise ModeconnError(
                "subnetworks that are trained together must have equal shapes: "
                f"that of entry layer {subs[0].entry} has widths {list(subs[0].widths)} "
                f"on {len(subs[0].kept)} units, that of entry layer {sub.entry} "
                f"{list(sub.widths)} on {len(sub.kept)}"
            )


def _signature(chain: LayerChain, sub: Subnetwork) -> list[object]:
    """Describes what two subnetworks must have in common to be stacked."""
    shapes = [(tuple(w.shape), b is not None) for w, b in zip(sub.weights, sub.biases)]
    # Steps after the readout's layer in the chain do not act on the readout.
    hidden = chain.layers[sub.entry : sub.entry + len(sub.weights) - 1]
    acts = [(layer.kind, _unit_wise_steps(layer), str(layer.geometry())) for layer in hidden]
    # A convolution's subnetworks run in the layers of their own entry layer.
    place = sub.entry if chain.layer(sub.entry + 1).kind != "linear" else "linear"
    return [len(sub.kept), shapes, acts, place]


def _unit_wise_steps(layer: AffineLayer) -> list[str]:
    return [step.op for step in layer.steps if step.op != "batch_norm"]
