"""Checkpoints of training scripts: names with prefixes, other objects, several states."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
Y = torch.arange(20) % 3


class Wrap(nn.Module):
    """A network whose only child has the name that DataParallel gives to its own."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = Wrap()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def ends(kind: type[nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind(), kind()]


def saved(content: object, folder: Path, name: str = "a.pt", **options: bool) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


@pytest.mark.parametrize("kind", [Wrap, Twice])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_whose_only_child_is_called_module(kind, wrapped: bool, tmp_path: Path):
    networks = ends(kind)
    states = [(nn.DataParallel(n) if wrapped else n).state_dict() for n in networks]
    files = [saved(state, tmp_path, f"{i}.pt") for i, state in enumerate(states)]
    path = mc.Line(*files)
    for _ in range(2):
        result = mc.evaluate(networks[0], path, (X, Y), 2)
        for network, loss in zip(networks, result.loss):
            assert loss == pytest.approx(F.cross_entropy(network(X), Y).item(), rel=1e-5)
    networks[0].load_state_dict(path.at(0.5))
    assert mc.forward(networks[0], mc.Line(*files), [0.5], X).shape == (1, 20, 3)


@pytest.mark.parametrize(
    ("key", "old"),
    [("model", False), ("state_dict", False), ("net", False), (None, False), ("state_dict", True)],
)
def test_the_advice_for_other_objects_works(
    key: str | None, old: bool, tmp_path: Path, monkeypatch
):
    state = ends(Wrap)[0].state_dict()
    args = argparse.Namespace(lr=1)
    content = {"args": args, "epoch": 3, key: state} if key else {**state, "args": args}
    file = saved(content, tmp_path, _use_new_zipfile_serialization=not old)
    with pytest.raises(mc.ModeconnError, match="Namespace") as caught:
        mc.load(file)
    advice = str(caught.value).partition("convert it once: ")[2]
    if key is None:
        assert "if torch.is_tensor(v)" in advice
    monkeypatch.chdir(tmp_path)
    exec(advice, {"torch": torch})
    for name, value in mc.load(tmp_path / "weights.pt").items():
        assert torch.equal(value, state["module." + name])


@pytest.mark.parametrize("other", ["state_dict_ema", "ema", "best"])
def test_which_of_several_states_is_taken_is_said(other: str, tmp_path: Path):
    state = ends(Wrap)[0].state_dict()
    averaged = {name: value + 1 for name, value in state.items()}
    content = {other: averaged, "state_dict": state, "optimizer": {"state": {}, "lr": 1}}
    for source in (content, saved(content, tmp_path)):
        with pytest.warns(UserWarning, match=f"'state_dict' is taken, and not '{other}'"):
            found = mc.load(source)
        assert torch.equal(next(iter(found.values())), state["module.weight"])
    found = mc.load(torch.load(tmp_path / "a.pt", weights_only=True)[other])  # what it says
    assert torch.equal(found["module.weight"], averaged["module.weight"])


@pytest.mark.filterwarnings("error")
def test_one_state_is_taken_without_a_word(tmp_path: Path):
    state = ends(Wrap)[0].state_dict()
    moments = {name: torch.zeros(2) for name in ("a", "b")}
    mc.load(saved({"state_dict": copy.copy(state), "scaler": moments, "epoch": 2}, tmp_path))
