"""Metrics of the whole data set: equal to those of all outputs at once, whatever the batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import modeconn as mc
from evaluate_cases import X, Y, nets  # noqa: F401  # a fixture
from modeconn.evaluation import gathering
from refused import refused

POINTS = [0.0, 0.3, 0.3, 1.0, 0.7]


def ece(outputs: Tensor, targets: Tensor) -> Tensor:
    """The expected calibration error, in 15 bins (Guo et al. 2017)."""
    confidence, guess = outputs.softmax(1).max(1)
    gaps = confidence - guess.eq(targets).to(confidence)
    bins = (confidence * 15).long()
    return torch.zeros(16, dtype=gaps.dtype).index_add(0, bins, gaps).abs().sum() / len(gaps)


def auc(outputs: Tensor, targets: Tensor) -> float:
    """The area under the ROC curve of class 0 against the rest, by ranks."""
    scores, positive = outputs[:, 0].numpy(), targets.numpy() == 0
    ranks = scores.argsort().argsort() + 1
    above = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return above / (positive.sum() * (~positive).sum())


def f1(outputs: Tensor, targets: Tensor) -> np.ndarray:
    """The macro average of F1."""
    guess = outputs.argmax(1)
    of_classes = []
    for k in range(outputs.shape[1]):
        hits = float((guess.eq(k) & targets.eq(k)).sum())
        of_classes.append(2 * hits / float(guess.eq(k).sum() + targets.eq(k).sum()))
    return np.array([np.mean(of_classes)])


METRICS = [ece, auc, f1]


def by_points(model: nn.Module, path: mc.PolyChain, points: list) -> dict[str, list[float]]:
    """Each metric of all outputs of each network, in float64."""
    path = mc.PolyChain([{k: v.double() for k, v in p.items()} for p in path.control_points])
    found = {}
    for function in METRICS:
        rows = []
        for t in points:
            outputs = torch.func.functional_call(model, path.at(t), X.double())
            rows.append(np.asarray(function(outputs, Y)).item())
        found[function.__name__] = rows
    return found


@pytest.mark.parametrize(
    ("backend", "batch_size"), [("reference", 1), ("reference", 37), ("native", 130), ("auto", 64)]
)
def test_batches_make_no_difference(nets, backend, batch_size):  # noqa: F811
    path = mc.PolyChain(nets)
    with torch.no_grad():
        right = by_points(nets[0], path, POINTS)
    result = mc.evaluate(
        nets[0], path, DataLoader(TensorDataset(X, Y), batch_size=50), POINTS,
        metrics=["error", *map(mc.DatasetMetric, METRICS), "loss"],
        backend=backend, batch_size=batch_size, precision="float64",
    )  # fmt: skip
    assert list(result.values) == ["error", "ece", "auc", "f1", "loss"]
    for name, values in right.items():
        np.testing.assert_allclose(result.metric(name), values, rtol=1e-12, atol=1e-15)
    alone = mc.evaluate(nets[0], path, (X, Y), POINTS, precision="float64")
    np.testing.assert_allclose(result.loss, alone.loss, rtol=1e-12)
    np.testing.assert_array_equal(result.error, alone.error)


def test_it_is_that_of_scikit_learn(nets):  # noqa: F811
    scores = pytest.importorskip("sklearn.metrics")
    data = {"all": (X, Y), "some": (X[:64], Y[:64])}
    metric = mc.DatasetMetric(
        lambda o, t: scores.roc_auc_score(t, o.softmax(1), multi_class="ovr", labels=range(10)),
        name="roc",
    )
    found = mc.evaluate(nets[0], mc.Line(*nets[:2]), data, 2, metrics=metric)
    right = scores.roc_auc_score(Y, nets[1](X).softmax(1).detach(), multi_class="ovr")
    assert found["all"].roc[1] == pytest.approx(right, abs=1e-6)
    assert found["some"].samples == 64 and found["some"].barrier("roc") >= 0


class Returns(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(20, 10), form

    def forward(self, x: Tensor) -> object:
        y = self.layer(x)
        if self.form == "an object":
            return SimpleNamespace(logits=y, more=y.sum(1))
        if self.form == "a number beside":
            return y, y.sum()
        return (y, {"twice": 2 * y})


@pytest.mark.filterwarnings("ignore:the model runs as it is", "ignore:the outputs for one row")
def test_what_networks_return():
    def right(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.argmax(1).eq(targets).float().mean()

    model = Returns("an object")
    metric = mc.DatasetMetric(right)
    result = mc.evaluate(
        model, mc.Line(model, Returns("an object")), (X, Y), 3, batch_size=33,
        metrics=["error", metric],
    )  # fmt: skip
    np.testing.assert_allclose(result.right, 1 - result.error, atol=1e-6)
    model = Returns("a tuple")
    inner = mc.evaluate(
        model, mc.Line(model, Returns("a tuple")), (X, Y), 3, batch_size=33,
        loss=lambda o, t: F.cross_entropy(o[0], t, reduction="none"),
        metrics=[mc.DatasetMetric(lambda o, t: ece(o[1]["twice"] / 2, t), "inner")],
    )  # fmt: skip
    with torch.no_grad():
        assert inner.values["inner"][0] == pytest.approx(float(ece(model(X)[0], Y)), abs=1e-6)
    assert list(inner.values) == ["inner"]


def test_what_is_refused(nets, tmp_path, monkeypatch):  # noqa: F811
    path = mc.Line(*nets[:2])

    def asked(function, **options):
        metric = mc.DatasetMetric(function, "mine")
        return mc.evaluate(nets[0], path, (X, Y), 3, metrics=[metric], **options)

    with refused("resume keeps sums, and metric 'mine' needs all outputs"):
        asked(ece, resume=tmp_path / "r")
    with refused("metric 'mine' gives [130]: expected one number"):
        asked(lambda o, t: o[:, 0])
    with refused("metric 'mine' gives NoneType: expected one number"):
        asked(lambda o, t: None)
    with refused("function is of type str: expected a callable"):
        mc.DatasetMetric("ece")
    with refused("metrics has 'mine' twice"):
        mc.evaluate(nets[0], path, (X, Y), 3, metrics=[mc.DatasetMetric(ece, "mine")] * 2)
    monkeypatch.setattr(gathering, "main_memory", lambda: 10_000)
    with refused("metric 'mine' needs the outputs of 130 samples at 3 points", "fewer points"):
        asked(ece)


@pytest.mark.filterwarnings("ignore:the model runs as it is", "ignore:the outputs for one row")
def test_outputs_without_rows_are_refused():
    model = Returns("a number beside")
    with refused("needs a row per sample"):
        mc.evaluate(
            model, mc.Line(model, Returns("a number beside")), (X, Y), 3,
            loss=lambda o, t: F.cross_entropy(o[0], t, reduction="none"),
            metrics=[mc.DatasetMetric(ece)],
        )  # fmt: skip
