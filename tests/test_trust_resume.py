"""What is resumed is the same computation: loss, metrics, network and data; others are refused."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.evaluation import resume
from modeconn.files.fingerprints import digest_of
from modeconn.training.checkpoint import training_file
from refused import refused
from train_cases import network, run, weights

X = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(200) % 3
SCALE = 1.0


def pair(*layers: Callable[[], nn.Module]) -> list[nn.Module]:
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ends.append(nn.Sequential(*[layer() for layer in layers]))
    return ends


def perceptrons(activation: type[nn.Module] = nn.ReLU) -> list[nn.Module]:
    return pair(lambda: nn.Linear(6, 8), activation, lambda: nn.Linear(8, 3))


def stopped_after(parts: int, file: Path, **options) -> None:
    """Interrupt an evaluation after so many parts."""
    a, b = perceptrons()
    done, count = resume.Stage.done, [0]

    def stop(self, sums) -> None:
        done(self, sums)
        count[0] += 1
        if count[0] == parts:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume.Stage, "done", stop)
        with pytest.raises(KeyboardInterrupt):
            mc.evaluate(a, mc.Line(a, b), (X, Y), 3, batch_size=25, resume=file, **options)


@pytest.mark.parametrize("rows", [25, 100, 124])
def test_less_data_than_was_done_is_refused(tmp_path: Path, rows: int):
    a, b = perceptrons()
    file = tmp_path / "f"
    stopped_after(5, file)
    options = {"batch_size": 25, "resume": file}
    with refused("on other data", str(file)):
        mc.evaluate(a, mc.Line(a, b), (X[:rows], Y[:rows]), 3, **options)
    got = mc.evaluate(a, mc.Line(a, b), (X, Y), 3, **options)
    whole = mc.evaluate(a, mc.Line(a, b), (X, Y), 3, batch_size=25)
    np.testing.assert_array_equal(got.loss, whole.loss)


@pytest.mark.parametrize("change", ["order", "last row", "labels", "dtype"])
def test_other_data_is_refused(tmp_path: Path, change: str):
    a, b = perceptrons()
    stopped_after(4, tmp_path / "f")
    x, y = X.clone(), Y.clone()
    if change == "order":
        x[[0, 1]], y[[0, 1]] = x[[1, 0]], y[[1, 0]]
    elif change == "last row":
        x[99, 5] = x[99, 5].nextafter(torch.tensor(9.0))
    elif change == "labels":
        y[98:100] = y[98:100].flip(0)
    else:
        x = x.double()
    precision = "float64" if change == "dtype" else "float32"
    with refused("other", str(tmp_path / "f")):
        mc.evaluate(
            a, mc.Line(a, b), (x, y), 3, batch_size=25, resume=tmp_path / "f", precision=precision
        )


def test_more_data_goes_on_from_what_is_done(tmp_path: Path):
    a, b = perceptrons()
    options = {"batch_size": 25, "resume": tmp_path / "f"}
    mc.evaluate(a, mc.Line(a, b), (X[:100], Y[:100]), 3, **options)
    got = mc.evaluate(a, mc.Line(a, b), (X, Y), 3, **options)
    whole = mc.evaluate(a, mc.Line(a, b), (X, Y), 3, batch_size=25)
    assert got.samples == 200
    np.testing.assert_array_equal(got.loss, whole.loss)


def test_statistics_of_other_data_are_not_taken(tmp_path: Path):
    """Less is refused, and more changes the statistics that the finished sums were made with."""
    a, b = pair(lambda: nn.Linear(6, 8), lambda: nn.BatchNorm1d(8), lambda: nn.Linear(8, 3))

    def evaluated(rows: int):
        return mc.evaluate(
            a,
            mc.Line(a, b),
            (X, Y),
            3,
            buffers="recompute",
            recompute_data=(X[:rows], Y[:rows]),
            batch_size=25,
            resume=tmp_path / "f",
        )

    evaluated(100)
    with refused("100 rows are done, and the data has 50"):
        evaluated(50)
    with refused("of another network"):
        evaluated(200)


class Weighted(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 1.0, weight]))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, self.weight, reduction="none")


class Tempered:
    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs / self.temperature, targets, reduction="none")


def smoothed(amount: float) -> Callable[..., Tensor]:
    return functools.partial(F.cross_entropy, reduction="none", label_smoothing=amount)


def enclosed(power: float) -> Callable[..., Tensor]:
    return lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none") ** power


def scaled(outputs: Tensor, targets: Tensor) -> Tensor:
    return SCALE * F.cross_entropy(outputs, targets, reduction="none")


def doubled(outputs: Tensor, targets: Tensor, by: float = 2.0) -> Tensor:
    return by * F.cross_entropy(outputs, targets, reduction="none")


def tripled(outputs: Tensor, targets: Tensor, by: float = 3.0) -> Tensor:
    return by * F.cross_entropy(outputs, targets, reduction="none")


tripled.__qualname__ = tripled.__name__ = "doubled"
LOSSES = {
    "a partial's arguments": (smoothed(0.0), smoothed(0.5)),
    "a module's buffer": (Weighted(1.0), Weighted(2.0)),
    "an object's attribute": (Tempered(1.0), Tempered(2.0)),
    "a bound method": (Tempered(1.0).__call__, Tempered(2.0).__call__),
    "a closure": (enclosed(1.0), enclosed(2.0)),
    "a default": (doubled, tripled),
    "PyTorch's module": (
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(reduction="none", label_smoothing=0.3),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_another_loss_of_the_same_name_is_refused(tmp_path: Path, name: str):
    a, b = perceptrons()
    first, second = LOSSES[name]
    assert digest_of(first) == digest_of(first) != digest_of(second)
    options = {"resume": tmp_path / "f"}
    path = mc.Line(a, b)
    before = mc.evaluate(a, path, (X, Y), 3, loss=first, **options).loss
    with refused("other definition of the loss"):
        mc.evaluate(a, path, (X, Y), 3, loss=second, **options)
    again = mc.evaluate(a, path, (X, Y), 3, loss=first, **options).loss
    np.testing.assert_array_equal(again, before)


def test_a_metric_that_differs_is_refused(tmp_path: Path):
    a, b = perceptrons()
    for amount in (1.0, 2.0):
        metrics = ["loss", enclosed(amount)]
        if amount == 1.0:
            mc.evaluate(a, mc.Line(a, b), (X, Y), 3, metrics=metrics, resume=tmp_path / "f")
            continue
        with refused("other definition of the metrics"):
            mc.evaluate(a, mc.Line(a, b), (X, Y), 3, metrics=metrics, resume=tmp_path / "f")


def test_a_global_value_that_a_loss_reads_counts(monkeypatch):
    before = digest_of(scaled)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    assert digest_of(scaled) != before


class Tempering(nn.Module):
    def __init__(self, temperature: float, shift: Tensor) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.temperature = temperature
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) / self.temperature + self.shift


ZERO = torch.zeros(3)
NETWORKS: dict[str, tuple[nn.Module, nn.Module]] = {
    "activation": (perceptrons()[0], perceptrons(nn.Tanh)[0]),
    "attribute": (Tempering(1.0, ZERO), Tempering(2.0, ZERO)),
    "constant": (Tempering(1.0, ZERO), Tempering(1.0, torch.tensor([0.0, 1.0, 0.0]))),
    "norm's eps": (
        nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3)),
        nn.Sequential(nn.Linear(6, 3), nn.LayerNorm(3, eps=0.1)),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_another_network_with_such_weights_is_refused(tmp_path: Path, name: str):
    first, second = NETWORKS[name]
    state = {key: value + 0.1 for key, value in first.state_dict().items()}
    path = mc.Line(first.state_dict(), state)
    mc.evaluate(first, path, (X, Y), 3, resume=tmp_path / "f")
    with refused("of another network", str(tmp_path / "f")):
        mc.evaluate(second, path, (X, Y), 3, resume=tmp_path / "f")
    mc.evaluate(first, path, (X, Y), 3, resume=tmp_path / "f")


DIGEST = """
import functools, torch
from torch import nn
from torch.nn import functional as F
import modeconn as mc
from modeconn.capture.export import capture, prepare
from modeconn.evaluation.resume import digest_of_network
from modeconn.files.fingerprints import digest_of
net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
                    nn.Linear(108, 4))
def loss(o, t, names=frozenset("abc")):
    return F.cross_entropy(o, t, reduction="none") if names & {"a", "b"} else o
graph = capture(prepare(net, torch.float32, torch.device("cpu")), torch.zeros(5, 1, 8, 8))
print(digest_of_network(graph), digest_of(loss))
print(digest_of(functools.partial(loss, names={"x", "y"})))
"""


def test_digests_are_the_same_in_every_process(capsys, fresh_graphs):
    """Here and in another process, whose sets and dicts of strings have another order."""
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    exec(compile(DIGEST, "<string>", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == done.stdout


def test_training_of_another_architecture_is_refused(tmp_path: Path):
    """Tanh for ReLU: the same names and shapes, another function."""
    data = torch.randn(100, 64, generator=torch.Generator().manual_seed(1)), torch.arange(100) % 10
    file = tmp_path / "a.safetensors"

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(network(), data, checkpoint=file, log=stop)
    before = training_file(file).read_bytes()
    other = network(spec="mlp:64-32-10:tanh")
    with refused("of another network", str(training_file(file))):
        run(other, data, checkpoint=file, resume=True)
    less = data[0][:90], data[1][:90]
    with refused("samples 100, not 90"):
        run(network(), less, checkpoint=file, resume=True)
    assert training_file(file).read_bytes() == before
    whole, resumed = network(), network()
    run(whole, data)
    run(resumed, data, checkpoint=file, resume=True)
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[key])
