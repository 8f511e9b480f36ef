"""Permutation groups, alignment and its files: functions stay, planted permutations are found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from alignment_cases import CASES, ROW, randomized
from alignment_networks import Encoder
from modeconn.cli import main
from modeconn.training.alignment.groups import Group, Groups
from modeconn.training.alignment.layouts import Layout
from modeconn.training.alignment.proof import apart

QUICK = [name for name, case in CASES.items() if case.quick]
SLOW = [name for name, case in CASES.items() if not case.quick]


def mlp() -> nn.Module:
    return randomized(CASES["mlp"].make)


@pytest.fixture(scope="module")
def found() -> Groups:
    return mc.symmetries(mlp(), ROW.double())


def moved(groups: Groups, model: nn.Module, seed: int) -> dict[str, Tensor]:
    return groups.permuted(model.state_dict(), groups.random(seed))


def check_network(name: str) -> None:
    """Counts are those by hand, functions stay, and what was permuted is put back from data."""
    case = CASES[name]
    model = randomized(case.make)
    x = case.x.double() if case.x.is_floating_point() else case.x
    groups = mc.symmetries(model, x)
    assert groups.log10 == pytest.approx(case.log10, abs=1e-9), str(groups)
    with torch.no_grad():
        expected = model(x)
    for seed in range(2):
        state = moved(groups, model, seed)
        other = randomized(case.make)
        other.load_state_dict(state)
        with torch.no_grad():
            apart = (other(x) - expected).abs().max() / expected.abs().max()
        assert apart <= 1e-10
        assert any(not torch.equal(state[key], value) for key, value in model.state_dict().items())
    found = mc.align(model, model, state, (x, torch.zeros(len(x))), groups=groups)
    back = found.apply(state)
    for key, value in model.state_dict().items():
        assert torch.equal(back[key], value), f"{name}: {key}"


@pytest.mark.parametrize("name", QUICK)
def test_networks(name: str):
    check_network(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_networks(name: str):
    check_network(name)


def test_there_are_enough_networks():
    assert len(CASES) > 30


# -- groups ----------------------------------------------------------------------------------------


def test_what_is_frozen_is_named(found: Groups):
    assert [(g.name, g.size, g.within) for g in found] == [
        ("0.weight", 8, None),
        ("2.weight", 7, None),
    ]
    assert found.groups[0].places == (("0.weight", 0), ("0.bias", 0), ("2.weight", 1))
    frozen = {(each.entry, each.axis): each.operation for each in found.frozen}
    assert frozen == {("0.weight", 1): "input", ("4.weight", 0): "output", ("4.bias", 0): "output"}
    assert "2 groups, 15 units, 10^8.3 permutations" in str(found)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(10, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.c.weight = self.b.weight
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            return self.out(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))

    model = randomized(Tied)
    groups = mc.symmetries(model, ROW.double())
    assert [group.size for group in groups] == [6]
    state = moved(groups, model, 3)
    assert torch.equal(state["b.weight"], state["c.weight"])


class Unknown(nn.Module):
    """A running sum over units, whose order counts."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.cumsum(self.a(x), 1))


def test_an_operation_without_a_rule_freezes_what_it_touches():
    model = randomized(Unknown)
    groups = mc.symmetries(model, ROW.double())
    assert len(groups) == 0
    assert {each.operation for each in groups.frozen if each.entry == "b.weight"} >= {
        "cumsum: no rule of its axes"
    }
    with pytest.raises(mc.ModeconnError, match=r"no units that can be permuted.*cumsum: no rule"):
        mc.align(model, model, model, (ROW.double(), torch.zeros(64)))


def test_groups_are_proved_before_they_are_believed(monkeypatch):
    """Where a rule is wrong, the network shows it, and the group is frozen."""
    from modeconn.plan.rules import table, tying
    from modeconn.plan.rules.base import Rule

    monkeypatch.setitem(table._TIED, "cumsum", Rule(ties=tying.elementwise))
    groups = mc.symmetries(randomized(Unknown), ROW.double())
    assert len(groups) == 0
    assert any("a random permutation changed the outputs" in f.operation for f in groups.frozen)


# -- alignment -------------------------------------------------------------------------------------


def pair() -> tuple[nn.Module, dict[str, Tensor], tuple[Tensor, Tensor]]:
    model = mlp()
    return (
        model,
        dict(randomized(CASES["mlp"].make, 1).state_dict()),
        (ROW.double(), torch.zeros(64)),
    )


def test_a_planted_permutation_has_no_barrier(found: Groups):
    model, _, data = pair()
    state = moved(found, model, 5)
    aligned = mc.align(model, model, state, data).apply(state)
    targets = torch.arange(64) % 5
    result = mc.evaluate(
        model,
        mc.Line(model, {k: v.clone() for k, v in aligned.items()}),
        (data[0], targets),
        3,
        precision="float64",
    )
    assert abs(result.barrier("loss")) <= 1e-6


def test_data_raise_the_correlation_and_weights_the_product():
    model, b, data = pair()
    by_data = mc.align(model, model, b, data)
    assert by_data.method == "activations"
    assert by_data.samples == 64
    assert by_data.objective_after > by_data.objective_before
    assert by_data.note == ""
    by_weights = mc.align(model, model, b, sample=data[0])
    assert by_weights.method == "weights"
    assert by_weights.objective_after >= by_weights.objective_before
    assert "weights alone" in str(by_weights)
    assert mc.same_function(model, by_weights.apply(b), data).same is False
    for each in (by_data, by_weights):
        twin = mlp()
        twin.load_state_dict(b)
        assert mc.same_function(twin, each.apply(b), data).same


def test_correlations_are_numpys():
    model, b, data = pair()
    found = mc.align(model, model, b, data)
    twin = mlp()
    twin.load_state_dict(b)
    with torch.no_grad():
        one, other = (m[1](m[0](data[0])).numpy() for m in (model, twin))
    index = found.permutations["0.weight"]
    table = np.corrcoef(one.T, other.T)[:8, 8:]
    table = np.nan_to_num(table)
    ours = table[np.arange(8), index].sum()
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(table, maximize=True)
    assert ours == pytest.approx(table[rows, columns].sum())


def test_weights_find_a_planted_permutation(found: Groups):
    model, _, data = pair()
    state = moved(found, model, 2)
    aligned = mc.align(model, model, state, method="weights", sample=data[0]).apply(state)
    for key, value in model.state_dict().items():
        assert torch.equal(aligned[key], value)


def test_batches_and_samples_make_no_other_sums():
    model, b, data = pair()
    whole = mc.align(model, model, b, data)
    parts = mc.align(model, model, b, data, batch_size=7)
    assert parts.digest == whole.digest
    assert parts.objective_after == pytest.approx(whole.objective_after, rel=1e-12)
    assert mc.align(model, model, b, data, samples=20, batch_size=7).samples == 20


def test_groups_of_another_network_are_noticed():
    class Known(Unknown):
        def forward(self, x):
            return self.b(self.a(x))

    groups = mc.symmetries(randomized(Known), ROW.double())
    model, b = randomized(Unknown), randomized(Unknown, 1)
    with pytest.raises(mc.ModeconnError, match=r"b is another function.*are groups those"):
        mc.align(model, model, b, (ROW.double(), torch.zeros(64)), groups=groups)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_output_that_is_nan_is_no_small_difference(order: tuple[int, int]):
    one = [torch.ones(2), torch.ones(3)]
    other = [torch.ones(2), torch.full((3,), torch.nan)]
    found = apart([one[i] for i in order], [other[i] for i in order])
    assert not found <= 1.0


def test_inverse_undoes_it():
    case = CASES["encoder"]
    model = randomized(Encoder)
    groups = mc.symmetries(model, case.x.double())
    alignment = mc.Alignment("", groups.random(1), groups)
    state = alignment.apply(model)
    back = alignment.inverse().apply(state)
    for key, value in model.state_dict().items():
        assert torch.equal(back[key], value)
    assert alignment.check(model, case.x) <= 1e-10


@pytest.mark.parametrize("name", ["p.json", "p.safetensors"])
def test_files(name: str, tmp_path: Path):
    case = CASES["encoder"]
    model = randomized(Encoder)
    groups = mc.symmetries(model, case.x.double())
    alignment = mc.Alignment("activations", groups.random(1), groups, 0.1, 0.5, 32)
    alignment.save(tmp_path / name)
    again = mc.Alignment.load(tmp_path / name)
    assert again.digest == alignment.digest
    assert (again.method, again.samples, again.objective_after) == ("activations", 32, 0.5)
    assert again.groups.groups == groups.groups
    for key, value in alignment.apply(model).items():
        assert torch.equal(again.apply(model)[key], value)
    assert again.check(model, case.x) <= 1e-10


def test_a_layout_is_checked_against_numpy():
    """Units within heads, beside slices, along one axis: indices written out."""
    inner, outer = Layout(3, "unit"), Layout(2, "head")
    axis = Layout(10, "", "sum", (Layout(4), Layout(6, "", "product", (outer, inner))))
    group = Group("unit", 3, "head", 2, (("w", 0),))
    head = Group("head", 2, None, 1, (("w", 0),))
    groups = Groups((head, group), (), {"w": (axis,)})
    p, q = np.array([1, 0]), np.array([[2, 0, 1], [0, 2, 1]])
    got = groups.permuted({"w": torch.arange(10)}, {"head": p, "unit": q})["w"]
    expected = [*range(4), *(4 + 3 * p[h] + q[h][u] for h in range(2) for u in range(3))]
    assert got.tolist() == expected


# -- bad input -------------------------------------------------------------------------------------


def test_what_is_refused(found: Groups, monkeypatch):
    model, b, data = pair()
    other = randomized(lambda: nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 5)))
    refused = [
        ({"b": other.state_dict(), "data": data}, "b does not match the model in"),
        ({"method": "activations"}, 'method is "activations" and data is None'),
        ({}, "data, sample and groups are None"),
        ({"data": data, "method": "best"}, "method is 'best': expected one of auto"),
        ({"data": data, "samples": 0}, "samples is 0: expected a whole number"),
        ({"data": iter([data])}, "data is an iterator"),
    ]
    for arguments, message in refused:
        with pytest.raises(mc.ModeconnError, match=message):
            mc.align(model, model, **({"b": b} | arguments))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(mc.ModeconnError, match=r"pip install 'modeconn\[align\]'"):
        mc.align(model, model, b, data)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: g["0.weight"].update(index=[0] * 8), "that is no permutation"),
        (lambda g: g["0.weight"].update(index=list(range(7))), r"\[7\]: expected whole numbers"),
        (lambda g: g["0.weight"].update(index=[0.5] * 8), "float64"),
        (lambda g: g["0.weight"].update(index=[[0], [1, 2]]), "expected whole numbers"),
        (lambda g: g["0.weight"].update(size=9, index=list(range(9))), "has 8 indices"),
        (lambda g: g["0.weight"].pop("size"), "expected its size, places"),
        (lambda g: g.pop("0.weight"), "has 8 indices of '0.weight': expected None"),
    ],
)
def test_files_with_another_content(found: Groups, change, message: str, tmp_path: Path):
    file = tmp_path / "p.json"
    mc.Alignment("", found.random(0), found).save(file)
    content = json.loads(file.read_text())
    change(content["groups"])
    file.write_text(json.dumps(content))
    with pytest.raises(mc.ModeconnError, match=message):
        mc.Alignment.load(file)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"format": "modeconn.permutations.1"}'])
def test_files_of_another_kind(text: str, tmp_path: Path):
    file = tmp_path / "p.json"
    file.write_text(text)
    with pytest.raises(mc.ModeconnError, match=r"permutations|layouts"):
        mc.Alignment.load(file)
    with pytest.raises(mc.ModeconnError, match="cannot be read"):
        mc.Alignment.load(tmp_path / "none.json")


def test_apply_refuses_another_network(found: Groups):
    alignment = mc.Alignment("", found.random(0), found)
    with pytest.raises(mc.ModeconnError, match=r"'0\.weight' is missing"):
        alignment.apply({"w": torch.zeros(3)})


# -- the command -----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys):
    from modeconn import models
    from modeconn.parameters import state

    spec = "mlp:64-9-10"
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    networks = []
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        networks.append(models.build(spec))
        state.save(networks[-1].state_dict(), file, {"model": spec})
    out, saved = str(tmp_path / "c.safetensors"), str(tmp_path / "p.json")
    command = ["align", *files, "--data", "digits", "--limit", "200", "--out", out]
    assert main([*command, "--save", saved, "--json", str(tmp_path / "about.json")]) == 0
    printed = capsys.readouterr().out
    assert "1 groups, 9 units" in printed
    assert "aligned by activations" in printed
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["samples"] == 200
    alignment = mc.Alignment.load(saved)
    assert about["permutations"] == alignment.digest
    written, expected = mc.load(out), alignment.apply(networks[1])
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    x = torch.randn(20, 64)
    assert mc.same_function(networks[1], out, (x, torch.zeros(20))).same
    assert main([*command[:-1], files[0]]) == 2
    assert main([*command, "--save", "p.txt"]) == 2
    assert "must end in .json or .safetensors" in capsys.readouterr().err
