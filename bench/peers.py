"""Losses and errors at T points as careful users compute them without modeconn.

Each peer is as fast as its idea allows. It takes (model, path, x, y, t) and returns (losses [T],
errors [T]).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from modeconn.parameters.paths import Path

Peer = Callable[[nn.Module, Path, Tensor, Tensor, np.ndarray], tuple[np.ndarray, np.ndarray]]


def _finish(rows: list[tuple[Tensor, Tensor]], samples: int) -> tuple[np.ndarray, np.ndarray]:
    loss, error = (torch.stack(column).double().numpy() / samples for column in zip(*rows))
    return loss, error


def _stacked(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {}
    for key in states[0]:
        stacked[key] = torch.stack([state[key] for state in states])
    return stacked


def dataloader_loop(
    model: nn.Module, path: Path, x: Tensor, y: Tensor, t: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loads each point's weights, then goes through a DataLoader in batches of 100.

    Published evaluations do so.
    """
    rows = []
    loader = DataLoader(TensorDataset(x, y), batch_size=100)
    with torch.no_grad():
        for value in t:
            model.load_state_dict(path.at(value))
            loss, wrong = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
            for inputs, labels in loader:
                outputs = model(inputs)
                loss += F.cross_entropy(outputs, labels, reduction="sum")
                wrong += (outputs.argmax(1) != labels).sum()
            rows.append((loss, wrong.double()))
    return _finish(rows, y.numel())


def whole_tensor(
    model: nn.Module, path: Path, x: Tensor, y: Tensor, t: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loads each point's weights and runs the whole data set as one batch.

    The package loss-landscapes does so.
    """
    rows = []
    with torch.no_grad():
        for value in t:
            model.load_state_dict(path.at(value))
            outputs = model(x)
            loss = F.cross_entropy(outputs, y, reduction="sum")
            rows.append((loss, (outputs.argmax(1) != y).sum().double()))
    return _finish(rows, y.numel())


def channels_last_loop(
    model: nn.Module, path: Path, x: Tensor, y: Tensor, t: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loads each point's weights; model and images are channels last, in batches of 128.

    That is the fastest for convolutions.
    """
    rows = []
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for value in t:
            model.load_state_dict(path.at(value))
            loss, wrong = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
            for inputs, labels in zip(x.split(128), y.split(128)):
                outputs = model(inputs)
                loss += F.cross_entropy(outputs, labels, reduction="sum")
                wrong += (outputs.argmax(1) != labels).sum()
            rows.append((loss, wrong.double()))
    return _finish(rows, y.numel())


def functional_chunks(rows_per_chunk: int) -> Peer:
    """Returns a peer that runs functional_call in chunks of rows that stay in the cache.

    That is the fastest that plain PyTorch does on a CPU.
    """

    def run(
        model: nn.Module, path: Path, x: Tensor, y: Tensor, t: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        rows = []
        with torch.no_grad():
            for value in t:
                state = path.at(value)
                loss = torch.zeros((), dtype=torch.float64)
                wrong = torch.zeros((), dtype=torch.int64)
                for start in range(0, len(x), rows_per_chunk):
                    labels = y[start : start + rows_per_chunk]
                    inputs = (x[start : start + rows_per_chunk],)
                    outputs = functional_call(model, state, inputs, tie_weights=False)
                    loss += F.cross_entropy(outputs, labels, reduction="sum")
                    wrong += (outputs.argmax(1) != labels).sum()
                rows.append((loss, wrong.double()))
        return _finish(rows, y.numel())

    return run


def vmap_points(points_per_call: int, rows_per_chunk: int) -> Peer:
    """Returns a peer that maps functional_call over stacked weights by vmap.

    That is the "model ensembling" recipe of torch.func.
    """

    def run(
        model: nn.Module, path: Path, x: Tensor, y: Tensor, t: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        outputs_of = vmap(
            lambda state, inputs: functional_call(model, state, (inputs,), tie_weights=False),
            in_dims=(0, None),
        )
        rows = []
        with torch.no_grad():
            for first in range(0, len(t), points_per_call):
                states = [path.at(value) for value in t[first : first + points_per_call]]
                stacked = _stacked(states)
                loss = torch.zeros(len(states), dtype=torch.float64)
                wrong = torch.zeros(len(states), dtype=torch.int64)
                for start in range(0, len(x), rows_per_chunk):
                    labels = y[start : start + rows_per_chunk]
                    outputs = outputs_of(stacked, x[start : start + rows_per_chunk])
                    repeated = labels.repeat(len(states), *[1] * (y.dim() - 1))
                    flat = F.cross_entropy(outputs.flatten(0, 1), repeated, reduction="none")
                    loss += flat.view(len(states), -1).sum(1)
                    wrong += (outputs.argmax(2) != labels).flatten(1).sum(1)
                rows += list(zip(loss, wrong.double()))
        return _finish(rows, y.numel())

    return run


def re_estimating(channels_last: bool) -> Peer:
    """Returns a peer that re-estimates the norms' statistics at each point, then evaluates.

    The way of Garipov et al. 2018: `update_bn`, then `test`, in batches of 128 and the same data
    for both.
    """

    def run(
        model: nn.Module, path: Path, x: Tensor, y: Tensor, t: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model, x = copy.deepcopy(model).to(memory_format=layout), x.contiguous(memory_format=layout)  # type: ignore[call-overload]
        kind = nn.modules.batchnorm._BatchNorm
        norms = [module for module in model.modules() if isinstance(module, kind)]
        rows = []
        with torch.no_grad():
            for value in t:
                model.load_state_dict(path.at(value))
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # type: ignore[assignment]
                model.train()
                for inputs in x.split(128):
                    model(inputs)
                model.eval()
                loss = torch.zeros((), dtype=torch.float64)
                wrong = torch.zeros((), dtype=torch.int64)
                for inputs, labels in zip(x.split(128), y.split(128)):
                    outputs = model(inputs)
                    loss += F.cross_entropy(outputs, labels, reduction="sum")
                    wrong += (outputs.argmax(1) != labels).sum()
                rows.append((loss, wrong.double()))
        return _finish(rows, y.numel())

    return run
