"""modeconn.dropin.loss_landscapes against loss_landscapes 3.0.6 itself.

`make peers` runs these in an environment of their own; elsewhere they are skipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modeconn.dropin.loss_landscapes as ours
from dropin_cases import KINDS, SCANS, small
from modeconn.dropin.loss_landscapes import contract, values
from modeconn.evaluation.replay import schedule

theirs: Any = pytest.importorskip(
    "loss_landscapes", reason="loss_landscapes is not installed: run `make peers`"
)
metrics: Any = pytest.importorskip("loss_landscapes.metrics")
if not (contract.installed() or "").startswith("3."):
    pytest.skip(f"loss_landscapes {contract.installed()} is not 3.x", allow_module_level=True)


def outcome(library: Any, kind: str, scan: str, steps: int, how: str | None) -> Any:
    make, inputs = KINDS[kind]
    of = ours.metrics if library is ours else metrics
    metric = of.Loss(nn.CrossEntropyLoss(), inputs(), torch.arange(len(inputs())) % 3)
    torch.manual_seed(5)
    found = SCANS[scan](library, lambda seed: make(library, seed), metric, steps, how)
    return np.asarray(found), torch.get_rng_state()


@pytest.mark.parametrize("planned", [False, True], ids=["as it is", "planned"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_five_functions(kind: str, planned: bool, monkeypatch):
    if planned:
        for module in (schedule, values):
            monkeypatch.setattr(module, "worth", lambda *_: "")
    for scan in SCANS:
        for how in contract.NORMALIZATIONS if scan.startswith("random") else ["filter"]:
            for steps in (4, 5):
                got, state = outcome(ours, kind, scan, steps, how)
                expected, its = outcome(theirs, kind, scan, steps, how)
                assert got.shape == expected.shape and got.dtype == expected.dtype
                error = np.abs(got - expected).max()
                assert error <= 1e-5 * np.abs(expected).max(), (scan, how, steps)
                assert torch.equal(state, its)


X, Y = KINDS["mlp"][1](), torch.arange(30) % 4


def accuracy(model: Any) -> float:
    return (model.forward(X).argmax(1) == Y).float().mean().item()


def with_penalty(model: Any) -> float:
    squares = sum(float(p.square().sum()) for p in model.get_module_parameters())
    return F.cross_entropy(model.forward(X), Y).item() + 0.1 * squares


def of_the_module(model: Any) -> float:
    return F.cross_entropy(model.modules[0](X), Y).item()


def noisy(model: Any) -> float:
    return F.cross_entropy(model.forward(X + 0.1 * torch.randn_like(X)), Y).item()


def shuffled(model: Any) -> float:
    order = torch.randperm(30)[:10]
    return F.cross_entropy(model.forward(X[order]), Y[order]).item()


@pytest.mark.parametrize("metric", [accuracy, with_penalty, of_the_module, noisy, shuffled])
def test_metrics_of_ones_own(metric: Any, monkeypatch):
    for module in (schedule, values):
        monkeypatch.setattr(module, "worth", lambda *_: "")
    for scan in ("line", "random plane"):
        found = []
        for library in (ours, theirs):
            torch.manual_seed(2)
            found.append(SCANS[scan](library, small, metric, 6, "layer"))
        # one sample on the other side of a boundary is a thirtieth of the accuracy
        allowed = 0.04 if metric is accuracy else 1e-5
        assert np.abs(found[0] - found[1]).max() <= allowed * np.abs(found[1]).max()


@pytest.mark.filterwarnings("ignore:the function changes")
@pytest.mark.parametrize("name", ["Loss", "LossPerturbations", "MetricPipeline"])
def test_metrics_of_the_package_are_taken(name: str):
    if name == "Loss":
        metric = metrics.Loss(F.cross_entropy, X, Y)
    elif name == "LossPerturbations":
        metric = metrics.LossPerturbations(F.cross_entropy, X, Y, 3, 0.1)
    else:
        metric = metrics.MetricPipeline([metrics.Loss(F.cross_entropy, X, Y), accuracy])
    found = []
    for library in (ours, theirs):
        torch.manual_seed(2)
        found.append(library.linear_interpolation(small(0), small(1), metric, 5))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_exceptions_are_of_the_same_type():
    for library in (ours, theirs):
        with pytest.raises(AttributeError):
            library.random_line(small(0), accuracy, normalization="filters")
        with pytest.raises(ValueError):
            library.point({}, accuracy)


SCRIPT = """
import numpy as np, torch
{imported}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
start = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
x, y = torch.randn(64, 6), torch.randint(4, (64,))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(50):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
metric = loss_landscapes.metrics.Loss(torch.nn.CrossEntropyLoss(), x, y)
line = loss_landscapes.linear_interpolation(start, model, metric, 20, deepcopy_model=True)
plane = loss_landscapes.random_plane(
    model, metric, 10, 8, normalization="filter", deepcopy_model=True
)
"""


def test_a_script_with_one_line_changed():
    lines = {
        "theirs": "import loss_landscapes, loss_landscapes.metrics",
        "ours": "import modeconn.dropin.loss_landscapes as loss_landscapes",
    }
    figures: dict[str, dict[str, Any]] = {}
    for name, line in lines.items():
        figures[name] = {}
        exec(SCRIPT.format(imported=line), figures[name])
    for key in ("line", "plane"):
        mine, its = figures["ours"][key], figures["theirs"][key]
        assert np.abs(mine - its).max() <= 1e-5 * np.abs(its).max()
