"""Checkpoints in every usual form: modules, mappings, files, nests, prefixes, dtypes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from modeconn.parameters import state
from refused import refused
from state_cases import assert_same, network, weights

# ------------------------------------------------------------------------------------------------
# load


def test_a_module_gives_its_detached_state():
    module = network()
    found = state.load(module)
    assert_same(found, weights())
    assert not any(value.requires_grad for value in found.values())
    assert found["0.weight"].data_ptr() == module[0].weight.data_ptr()


def test_a_mapping_gives_a_copy_of_the_mapping():
    given = OrderedDict(weights())
    found = state.load(given)
    assert_same(found, given)
    del found["0.weight"]
    assert "0.weight" in given
    assert not state.load(dict(network().named_parameters()))["0.weight"].requires_grad


@pytest.mark.parametrize(
    "name", ["a.safetensors", "a.pt", "a.pth", "checkpoint.pth.tar", "noending"]
)
@pytest.mark.parametrize("form", ["safetensors", "zip", "old"])
def test_a_file_is_what_its_bytes_say(tmp_path: Path, name: str, form: str):
    file = tmp_path / name
    if form == "safetensors":
        save_file(weights(), file)
    else:
        torch.save(network().state_dict(), file, _use_new_zipfile_serialization=form == "zip")
    assert_same(state.load(file), weights())
    assert_same(state.load(str(file)), weights())


def test_home_is_expanded(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    state.save(weights(), "~/a.safetensors")
    assert_same(state.load("~/a.safetensors"), weights())


@pytest.mark.parametrize("form", ["safetensors", "zip"])
def test_a_file_may_be_overwritten_after_loading(tmp_path: Path, form: str):
    file = tmp_path / "a"
    write = save_file if form == "safetensors" else torch.save
    write(weights(0), file)
    found = state.load(file)
    write(weights(1), file)  # in place: through a memory map the loaded values would change
    assert_same(found, weights(0))


NESTED = {
    "garipov": {
        "epoch": 3,
        "model_state": weights(),
        "optimizer_state": {
            "state": {0: {"momentum_buffer": torch.ones(3, 4)}},
            "param_groups": [{"lr": 0.1}],
        },
    },
    "lightning": {
        "pytorch-lightning_version": "2.5",
        "epoch": 1,
        "state_dict": weights(),
        "optimizer_states": [{}],
        "hyper_parameters": {"lr": 0.1},
    },
    "tutorial": {
        "model_state_dict": weights(),
        "optimizer_state_dict": {},
        "loss": torch.tensor(0.1),
    },
    "timm": {"arch": "vgg", "state_dict": weights(0), "state_dict_ema": weights(1)},
    "fairseq": {"model": weights(), "args": None},
    "a name beside it": {"model": "vgg11", "state_dict": weights()},
    "settings beside it": {"model": {"depth": 3}, "state_dict": weights()},
    "net": {"net": weights(), "acc": 93.1},
}


@pytest.mark.filterwarnings("ignore:.*is taken, and not")  # tests/test_trust_checkpoints.py
@pytest.mark.parametrize("case", NESTED)
def test_a_nested_state_is_found(tmp_path: Path, case: str):
    torch.save(NESTED[case], tmp_path / "a.pt")
    assert_same(state.load(tmp_path / "a.pt"), weights())
    assert_same(state.load(NESTED[case]), weights())


def test_two_nested_states_are_refused():
    with refused("state dict", "'model_state'", "'state_dict'", "several"):
        state.load({"model_state": weights(0), "state_dict": weights(1)})


def test_entries_called_like_a_nest_are_entries():
    given = {"model": torch.ones(2), "net": torch.zeros(3)}
    assert_same(state.load(given), given)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        AveragedModel,
        lambda module: nn.DataParallel(nn.DataParallel(module)),
        lambda module: nn.ModuleDict({"_orig_mod": module}),  # as torch.compile names it
        lambda module: nn.DataParallel(nn.ModuleDict({"_orig_mod": module})),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "zip"])
def test_prefixes_of_wrappers_are_removed_from_files(tmp_path: Path, wrap, form: str):
    wrapped = wrap(network()).state_dict()
    (save_file if form == "safetensors" else torch.save)(wrapped, tmp_path / "a")
    assert_same(state.load(tmp_path / "a"), weights())


def test_prefixes_stay_where_not_every_name_has_them(tmp_path: Path):
    given = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(given, tmp_path / "a.pt")
    assert_same(state.load(tmp_path / "a.pt"), given)


def test_wrapped_modules_are_unwrapped_and_prefixes_of_mappings_stay():
    wrapped = nn.DataParallel(network())
    assert state.load(wrapped).keys() == network().state_dict().keys()
    assert state.load(wrapped.state_dict()).keys() == wrapped.state_dict().keys()


@pytest.mark.parametrize(
    "stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64]
)
@pytest.mark.parametrize("form", ["mapping", "safetensors", "zip"])
def test_dtype_converts_floating_entries_alone(tmp_path: Path, stored: torch.dtype, form: str):
    given = {
        "w": torch.tensor([1.5, -2.0]).to(stored),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True]),
    }
    source = given if form == "mapping" else tmp_path / "a"
    if form != "mapping":
        (save_file if form == "safetensors" else torch.save)(given, source)
    expected = {**given, "w": torch.tensor([1.5, -2.0])}
    assert_same(state.load(source, dtype=torch.float32), expected)
    assert state.load(source)["w"].dtype == stored


def test_dtype_converts_a_copy_of_a_module():
    module = network()
    assert state.load(module, dtype=torch.float64)["0.weight"].dtype == torch.float64
    assert module[0].weight.dtype == torch.float32


def test_an_integer_dtype_is_refused():
    with refused("dtype", "torch.int64", "torch.float32"):
        state.load(network(), dtype=torch.int64)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (3, ["int", "nn.Module"]),
        (None, ["NoneType"]),
        (torch.ones(2), ["Tensor", "state dict"]),
        ({}, ["no entries"]),
        (nn.ReLU(), ["ReLU", "no entries"]),
        (
            {"a": torch.ones(1), "b": [1.0], "c": np.ones(2)},
            ["2 of 3", "'b' is list", "'c' is ndarray"],
        ),
        ({0: torch.ones(1)}, ["the name 0 is int"]),
        ({"epoch": 3, "optimizer": {}}, ["'epoch' is int", "'model_state'"]),
        ({f"x{i}": i for i in range(9)}, ["9 of 9", "'x3' is int", "and 5 more"]),
        (nn.LazyLinear(3), ["LazyLinear", "'weight'", "not initialised"]),
    ],
)
def test_what_is_no_state_is_refused(source: object, words: list[str]):
    with refused(*words):
        state.load(source)
