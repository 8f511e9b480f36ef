"""What is not finite ranks last; autocast is off inside; one distinct point; outputs as objects."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import modeconn as mc
from modeconn import models
from modeconn.cli import main
from modeconn.parameters import mixtures, ranking, state
from refused import refused

NAN, INF = math.nan, math.inf
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(40) % 3
DATA = ["--data", "digits", "--limit", "100", "--by", "loss"]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_ranks_last(bad):
    for values in itertools.permutations([bad, 1.0, 2.0, 1.0]):
        order = ranking.order(values)
        assert [values[i] for i in order[:3]] == [1.0, 1.0, 2.0]
        assert order[0] == values.index(1.0) == ranking.best(values, "loss")
    with refused("loss is finite for none of 2"):
        ranking.best([bad, bad], "loss")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_the_lowest_point_is_finite(bad):
    def result(t, loss) -> mc.PathResult:
        return mc.PathResult(np.array(t), {"loss": np.array(loss)}, 1, 1, "native", 0.0)

    assert result([0.0, 0.5, 1.0], [bad, 2.0, 1.0]).lowest() == (1.0, 1.0)
    assert result([[0.0, 1.0], [1.0, 2.0]], [3.0, bad]).lowest() == ((0.0, 1.0), 3.0)
    with refused("finite for none of 2"):
        result([0.0, 1.0], [bad, bad]).lowest()
    picture = result([0.0, 0.5, 1.0], [bad, 2.0, 1.0]).terminal_plot()
    assert "nan" not in picture and "inf" not in picture


def test_a_greedy_soup_never_takes_what_is_not_finite():
    alone = np.array([NAN, 1.0, -INF, 0.5])
    asked = []

    def score(coefficients: np.ndarray) -> np.ndarray:
        asked.append(coefficients)
        return alone if len(coefficients) == 4 else np.array([NAN])

    seen = mixtures.greedy_soup(4, score)
    assert np.array_equal(seen[4], [0, 0.5, 0, 0.5])  # the best, and the next one of finite score
    # no mean is taken, so each candidate is joined to the best alone
    assert all(row[3] == 0.5 for row in seen[4:])
    with refused("finite for none of 2"):
        mixtures.greedy_soup(2, lambda coefficients: np.full(len(coefficients), NAN))


@pytest.fixture
def networks(tmp_path):
    """Files of a network, and of one whose logits overflow."""
    model = models.build("mlp:64-8x2-10")
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    files = [str(tmp_path / name) for name in ("a.safetensors", "huge.safetensors")]
    state.save(own, files[0], {"model": "mlp:64-8x2-10"})
    huge = {name: value * 1e30 for name, value in own.items()}
    state.save(huge, files[1], {"model": "mlp:64-8x2-10"})
    return files


@pytest.mark.filterwarnings("ignore:.*is not finite:RuntimeWarning")
@pytest.mark.parametrize("sums", [["--grid", "2"], ["--greedy"], []])
def test_mix_writes_the_best_finite_network(networks, sums, tmp_path, capsys):
    out = tmp_path / "best.safetensors"
    main(["mix", *networks[::-1], *sums, *DATA, "--out", str(out)])
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["1", "0", "1"]
    written, own = state.load(out), state.load(networks[0])
    assert all(torch.equal(written[name], own[name]) for name in own)


@pytest.mark.filterwarnings("ignore:.*is not finite:RuntimeWarning")
@pytest.mark.parametrize("sums", [["--grid", "2"], ["--greedy"]])
def test_mix_of_networks_none_of_which_is_finite_is_refused(networks, sums, tmp_path, capsys):
    out = tmp_path / "best.safetensors"
    assert main(["mix", networks[1], networks[1], *sums, *DATA, "--out", str(out)]) != 0
    assert "there is no best one" in capsys.readouterr().err
    assert not out.exists()


def two(factory):
    torch.manual_seed(0)
    a = factory()
    torch.manual_seed(1)
    return a, factory()


class Small(nn.Module):
    """Returns what it is told to, captured or as it is."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x).relu()
        outputs = self.last(hidden)
        if self.kind == "object":
            return SimpleNamespace(logits=outputs, hidden=[hidden])
        if self.kind == "dict":
            return {"logits": outputs, "hidden": hidden}
        return (outputs, hidden) if self.kind == "tuple" else outputs


def logits_of(outputs):
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "logits", outputs)


def loss_of_outputs(outputs, targets):
    return F.cross_entropy(logits_of(outputs), targets, reduction="none")


@pytest.mark.filterwarnings("ignore:the model runs as it is")
@pytest.mark.parametrize("kind", ["object", "dict", "tuple", "tensor"])
def test_one_distinct_point(kind):
    a, b = two(lambda: Small(kind))
    right = {}
    for t in (0.0, 0.25, 0.5):
        module = Small(kind)
        own = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
        module.load_state_dict({name: (1 - t) * v + t * w for (name, v), w in own})
        with torch.no_grad():
            right[t] = float(loss_of_outputs(module(X), Y).mean())
    cases = [
        (mc.Line(a, b), [0.5], [0.5]),
        (mc.Line(a, b), [0.0], [0.0]),
        (mc.Line(a, b), [0.5, 0.5], [0.5, 0.5]),
        (mc.Line(a, b), [0.25, 0.5, 0.25], [0.25, 0.5, 0.25]),
        (mc.Mixture([a, b]), [(0.75, 0.25)], [0.25]),
        (mc.Line(a, a), 3, [0.0, 0.0, 0.0]),
    ]
    for path, points, places in cases:
        result = mc.evaluate(a, path, (X, Y), points, loss=loss_of_outputs, batch_size=7)
        np.testing.assert_allclose(result.loss, [right[t] for t in places], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_calls_changes_nothing(dtype):
    a, b = two(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    path = mc.Line(a, b)

    def numbers() -> list[np.ndarray]:
        result = mc.evaluate(a, path, (X, Y), 5, backend="reference")
        outputs = mc.forward(a, path, 5, X)
        table = mc.dropout_stability(a, a, (X, Y), draws=2)
        return [result.loss, result.error, outputs.numpy(), np.array(table.original.train_loss)]

    plain = numbers()
    with torch.autocast("cpu", dtype):
        around = numbers()
        assert torch.is_autocast_enabled("cpu")
        print(mc.explain(a, path, X[:2]))
    for one, other in zip(plain, around, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
