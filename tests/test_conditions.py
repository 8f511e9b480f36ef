"""Which conditions a network meets: known cases, counted by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from modeconn.errors import ModeconnError
from modeconn.stability.criteria import conditions
from naive import mlp
from walk import conv_net


def data(
    samples: int = 60, d: int = 5, classes: int = 3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, d, generator=generator)
    return x, (x @ torch.randn(d, classes, generator=generator)).argmax(1)


def test_half_and_half_of_every_layer() -> None:
    model = mlp(5, 8, 9, 7, 3)
    table = conditions(model, model, data())
    assert [row.entry for row in table.rows] == [0, 1, 2, 3] and table.samples == 60
    assert [row.units for row in table.rows] == [5, 8, 9, 7]
    assert [row.kept for row in table.rows] == [5, 4, 4, 4]
    assert [row.width for row in table.rows] == [3, 3, 3, 0]
    assert all(row.room and row.shortage == "" for row in table.rows)
    ratios = [row.root_ratio for row in table.rows]
    assert ratios[:2] == pytest.approx([3 / math.sqrt(60)] * 2) and all(map(math.isnan, ratios[2:]))
    # The inputs are separable by construction, so the readout's witness exists at entry layer 0.
    assert table.rows[0].separable is True and table.rows[0].margin > 0
    assert all(row.distinct for row in table.rows[:1])


def test_shortage_names_layer_and_units() -> None:
    model = mlp(5, 8, 8, 8, 3)
    rows = conditions(model, model, data(), kept=0.75, width=0.5, separability=False).rows
    assert [row.room for row in rows] == [False, False, False, True]
    assert rows[0].shortage == "layer 1 has 8 units, 2 short of m_{0,1} + |I_1| = 4 + 6"
    rows = conditions(model, model, data(), kept=0.25, width=0.75, separability=False).rows
    assert "layer 2 has 8 units, 4 short of m_{0,2} + m_{1,2} = 6 + 6" in rows[0].shortage
    assert (
        rows[1].shortage == "layer 3 has 8 units, 4 short of m_{1,3} + m_{2,3} = 6 + 6"
        and rows[2].room
    )
    rows = conditions(model, model, data(), width=0.1, separability=False).rows
    assert not rows[0].room and "layer 1 has too few units" in rows[0].shortage


def test_features_that_coincide() -> None:
    """A layer that gives 0 for negative inputs gives all such samples the same features."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    x = torch.tensor([[-1.0], [-2.0], [-3.0], [1.0], [2.0], [1.0]])
    y = torch.tensor([0, 0, 1, 1, 1, 1])
    rows = conditions(model, model, (x, y)).rows
    assert [(row.repeated, row.conflicting) for row in rows] == [(1, 0), (3, 1)]
    assert [row.distinct for row in rows] == [False, False]
    assert [row.separable for row in rows] == [False, False]
    assert "samples 0 and 2" in rows[1].reason


def test_exclusive_or_becomes_separable() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, -1.0]))
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([0, 1, 1, 0])
    rows = conditions(model, model, (x, y), kept=1.0).rows
    assert [row.separable for row in rows] == [False, True]
    assert rows[1].repeated == 1 and rows[1].conflicting == 0


def test_convolutions_and_selected_entries() -> None:
    model = conv_net().eval()
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 2, 8, 8, generator=generator), torch.arange(20) % 3
    seen = []
    table = conditions(
        model,
        model.state_dict(),
        (x, y),
        entries=[2, 1, 3],
        separability=[3],
        progress=lambda *done: seen.append(done),
    )
    assert [(row.entry, row.kept, row.units) for row in table.rows] == [
        (1, 3, 6),
        (2, 4, 7),
        (3, 4, 8),
    ]
    assert [row.reason == "" for row in table.rows] == [True, True, False]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    one = conditions(model, model, (x, y), entries=[3])
    assert one.rows[0] == table.rows[2]


def test_other_seeds_keep_other_units() -> None:
    model = mlp(5, 8, 9, 7, 3)
    margins = [
        conditions(model, model, data(), entries=[1], seed=seed).to_dict()["rows"]
        for seed in (0, 0, 1, 2, 3)
    ]
    assert margins[0] == margins[1] and any(other != margins[0] for other in margins[2:])


def test_memorising_is_decided_by_building_it() -> None:
    x, _ = data(samples=100, d=16)
    y = torch.randint(0, 3, (100,), generator=torch.Generator().manual_seed(1))
    wide, narrow = mlp(16, 32, 44, 60, 3), mlp(16, 32, 16, 44, 3)
    rows = conditions(wide, wide, (x, y), separability=False).rows
    assert [row.memorised for row in rows] == [True, True, True, None]
    assert "no hidden layer" in rows[3].memorised_reason
    rows = conditions(narrow, narrow, (x, y), separability=False).rows
    assert [row.memorised for row in rows[:3]] == [None, None, None]
    assert "100 samples need m·m' ≥ 4N = 400" in rows[0].memorised_reason
    assert "= 8 · 22 = 176" in rows[0].memorised_reason
    assert "100 samples on features of rank" in rows[2].memorised_reason
    twice = torch.cat([x, x[:1]]), torch.cat([y, (y[:1] + 1) % 3])
    rows = conditions(wide, wide, twice, separability=False).rows
    assert [row.memorised for row in rows[:3]] == [False, False, False]


def test_separability_of_drawn_of_all_and_of_chosen_units() -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    x[:, 0] += 0.5 * x[:, 0].sign()
    net = mlp(5, 24, 2)
    with torch.no_grad():
        net[0].weight[:, 0] = 0
        net[0].weight[[3, 17]] = torch.tensor([[1.0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0]])
        net[0].bias[[3, 17]] = 0.0
    row = conditions(net, net, (x, y), kept=0.125, entries=[1]).rows[0]
    assert row.separable is True
    assert row.chosen
    assert row.margin > 0
    with torch.no_grad():
        net[0].weight[[3, 17]] = 0.0
    row = conditions(net, net, (x, y), kept=0.125, entries=[1]).rows[0]
    assert row.separable is not True
    assert row.reason.startswith("all 24 units: ")


def test_table_as_text_frame_and_json() -> None:
    model = mlp(5, 8, 9, 7, 3)
    table = conditions(model, model, data(), separability=[0])
    lines = str(table).splitlines()
    assert lines[0] == "60 samples" and lines[1].split()[:2] == ["entry", "kept"]
    assert lines[2].split()[:4] == ["0", "5/5", "3", "yes"] and "yes" in lines[2].split()[-2]
    assert lines[5].split()[2:] == ["-", "yes", *lines[5].split()[4:6], "-", "-", "-", "-"]
    content = table.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["rows"][3]["root_ratio"] is None
    pytest.importorskip("pandas")
    frame = table.to_frame()
    assert frame.entry.tolist() == [0, 1, 2, 3] and frame.separable.tolist() == [
        True,
        None,
        None,
        None,
    ]


def test_bad_input() -> None:
    model = mlp(5, 8, 3)
    with pytest.raises(ModeconnError, match="kept is 0: expected a fraction"):
        conditions(model, model, data(), kept=0)
    with pytest.raises(ModeconnError, match=r"width is 1\.5: expected a fraction"):
        conditions(model, model, data(), width=1.5)
    with pytest.raises(ModeconnError, match="entry layer 2: Sequential has entry layers 0 to 1"):
        conditions(model, model, data(), entries=[2])
    with pytest.raises(ModeconnError, match="holds no samples"):
        conditions(model, model, (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(ModeconnError, match="is not a chain"):
        conditions(nn.LSTM(5, 3), nn.LSTM(5, 3), data())
