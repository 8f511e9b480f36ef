"""Checkpoints in every usual form, the rules for usable states, and atomic writing."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from modeconn.errors import ModeconnError
from modeconn.files import atomic_write
from modeconn.parameters import state
from refused import refused


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


def weights(seed: int = 0) -> state.State:
    return {key: value.clone() for key, value in network(seed).state_dict().items()}


def assert_same(found: state.State, expected: state.State) -> None:
    """The same names and the same bits."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert found[key].shape == value.shape
        assert found[key].numpy().tobytes() == value.numpy().tobytes(), key


class Loud:
    """An object whose unpickling writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


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


def test_prefixes_of_modules_and_mappings_stay():
    wrapped = nn.DataParallel(network())
    assert state.load(wrapped).keys() == wrapped.state_dict().keys()
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


# -----------------------------------------------------------------------------------------------
# files


def packed(write) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def tar_of(content: bytes) -> bytes:
    def write(stream):
        with tarfile.open(fileobj=stream, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("storages"), io.BytesIO(content))

    return packed(write)


def zip_of(*names: str) -> bytes:
    def write(stream):
        with zipfile.ZipFile(stream, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return packed(write)


ZIP = packed(lambda stream: torch.save(weights(), stream))
OLD = packed(lambda stream: torch.save(weights(), stream, _use_new_zipfile_serialization=False))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty (0 bytes)"]),
        (LFS, ["git-lfs pointer", "git lfs pull"]),
        (b"<!DOCTYPE html><html>Sign in</html>", ["web page"]),
        (b"just some text", ["b'just some te'"]),
        (pickle.dumps({"w": np.ones(3)}, protocol=4), ["pickle", "run code"]),
        (tar_of(b"x"), ["tar archive"]),
        (
            packed(lambda stream: np.savez(stream, w=np.ones(3))),
            ["zip archive", "w.npy", "torch.save"],
        ),
        (zip_of("a/constants.pkl", "a/data.pkl"), ["TorchScript", "torch.jit.load"]),
        (ZIP[: len(ZIP) // 2], ["truncated", f"{len(ZIP) // 2:,} bytes"]),
        (ZIP[:-1], ["truncated", f"{len(ZIP) - 1:,} bytes"]),
        (OLD[:-1], ["truncated", f"{len(OLD) - 1:,} bytes"]),
        (OLD[:15] + b"\xff" * 20, ["truncated or damaged", "35 bytes", "cannot be decoded"]),
        (packed(lambda stream: torch.save([torch.ones(1)], stream)), ["list", "state dict"]),
        (packed(lambda stream: torch.save(torch.ones(1), stream)), ["Tensor", "state dict"]),
        (packed(lambda stream: torch.save({}, stream)), ["no entries"]),
        (packed(lambda stream: torch.save({"epoch": 3}, stream)), ["'epoch' is int"]),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes, words: list[str]):
    file = tmp_path / "a.pt"
    file.write_bytes(content)
    with refused(str(file), *words):
        state.load(file)


@pytest.mark.parametrize("keep", [5, 20, -1])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, keep: int):
    file = tmp_path / "a.safetensors"
    save_file(weights(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with refused(str(file), "expected a .safetensors" if keep == 5 else "truncated"):
        state.load(file)


def test_a_missing_file_is_refused(tmp_path: Path):
    with refused(str(tmp_path / "a.pt"), "no such file"):
        state.load(tmp_path / "a.pt")


def test_a_folder_is_refused_with_what_is_in_it(tmp_path: Path):
    with refused(str(tmp_path), "is a folder"):
        state.load(tmp_path)
    save_file(weights(), tmp_path / "model.safetensors")
    with refused(str(tmp_path), "is a folder", "model.safetensors"):
        state.load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_refused_and_the_recipe_in_the_message_works(
    tmp_path: Path, monkeypatch, zipped: bool
):
    monkeypatch.chdir(tmp_path)
    torch.save(network(), "module.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ModeconnError, match=r"module\.pt: a whole module: reading torch\.nn\.modules"
    ) as caught:
        state.load("module.pt")
    recipe = str(caught.value).partition("convert it once: ")[2]
    eval(recipe, {"torch": torch})
    assert_same(state.load("weights.pt"), weights())


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path: Path, zipped: bool):
    mark = tmp_path / "mark"
    for content in ({"state_dict": weights(), "x": Loud(mark)}, Loud(mark)):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        with refused(
            "a.pt", f"{os.mkdir.__module__}.mkdir", "can run code", "if you trust the file"
        ):
            state.load(tmp_path / "a.pt")
        assert not mark.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert mark.exists()  # so the trap works


def test_objects_beside_the_weights_are_refused_and_the_recipe_works(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"state_dict": weights(), "hyper_parameters": argparse.Namespace(lr=0.1)}, "last.ckpt"
    )
    with pytest.raises(
        ModeconnError, match=r"not weights alone: reading argparse\.Namespace can run"
    ) as caught:
        state.load("last.ckpt")
    eval(str(caught.value).partition("convert it once: ")[2], {"torch": torch})
    assert_same(state.load("weights.pt"), weights())


@hypothesis.settings(max_examples=150)
@hypothesis.given(data=st.data())
def test_any_damage_gives_a_state_or_one_clear_line(tmp_path_factory, data: st.DataObject):
    """No other exception, whatever bytes are lost or changed."""
    small = {"w": torch.ones(2)}
    form = data.draw(st.sampled_from(["zip", "old", "safetensors"]))
    file = tmp_path_factory.getbasetemp() / "damaged"
    if form == "safetensors":
        save_file(small, file)
    else:
        torch.save(small, file, _use_new_zipfile_serialization=form == "zip")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        found = state.load(file)
    except ModeconnError as error:
        message = str(error)
    else:
        message = (
            str(file) if all(isinstance(value, torch.Tensor) for value in found.values()) else ""
        )
    assert str(file) in message
    assert "\n" not in message


def test_the_real_checkpoints_load_and_match(shared: Path):
    files = sorted((shared / "checkpoints").glob("mnist-*.safetensors"))
    assert len(files) == 2
    states = [state.load(file) for file in files]
    state.match(states, [file.name for file in files])
    for one, file in zip(states, files, strict=True):
        state.check(one, file.name)
        assert_same(one, load_file(file))
    assert states[0]["0.weight"].shape == (245, 784)
    other = next((shared / "checkpoints").glob("cifar10-*.safetensors"))
    with refused(other.name, files[0].name, "'0.weight' is missing", "more"):
        state.match([states[0], state.load(other)], [files[0].name, other.name])


# -----------------------------------------------------------------------------------------------
# match


def test_states_of_one_network_match_whatever_their_values_and_order():
    other = dict(reversed(weights(1).items()))
    other["1.num_batches_tracked"] = torch.tensor(99)
    state.match([weights(0), other, weights(2)], ["a", "b", "c"])
    state.match([weights()], ["alone"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.bias": None}, ["c does not match a in 1 entry: '0.bias' is missing"]),
        ({"x": torch.ones(2, 3)}, ["'x' [2, 3] is not expected"]),
        ({"0.weight": torch.ones(3, 5)}, ["'0.weight' is [3, 5], expected [3, 4]"]),
        (
            {"0.weight": torch.ones(3, 4).double()},
            ["'0.weight' is torch.float64, expected torch.float32"],
        ),
        ({"0.weight": torch.ones(3, 4, device="meta")}, ["'0.weight' is on meta, expected on cpu"]),
        (
            {"1.num_batches_tracked": torch.tensor([1])},
            ["'1.num_batches_tracked' is [1], expected []"],
        ),
        ({"0.bias": None, "x": torch.ones(1)}, ["2 entries", "'0.bias' is missing", "'x' [1]"]),
        (dict.fromkeys(list(weights())[1:]), [f"{len(weights()) - 1} entries", "and 4 more"]),
    ],
)
def test_differences_are_listed(change: dict[str, torch.Tensor | None], words: list[str]):
    changed = {key: value for key, value in {**weights(), **change}.items() if value is not None}
    with refused(*words):
        state.match([weights(), weights(), changed], ["a", "b", "c"])


def test_devices_count_only_if_asked():
    elsewhere = {key: value.to("meta") for key, value in weights().items()}
    state.match([weights(), elsewhere], ["a", "b"], devices=False)
    with refused("b does not match a", "on meta"):
        state.match([weights(), elsewhere], ["a", "b"])


@pytest.mark.parametrize("swap", [False, True])
def test_a_prefix_is_named_and_the_remedy_works(swap: bool):
    prefixed = {f"model.{key}": value for key, value in weights().items()}
    pair, names = [weights(), prefixed], ["plain", "lightning"]
    if swap:
        pair, names = pair[::-1], names[::-1]
    with pytest.raises(
        ModeconnError, match=r"every name in lightning begins with 'model\.'"
    ) as caught:
        state.match(pair, names)
    remedy = str(caught.value).partition("remove it: ")[2].removesuffix(")")
    assert_same(eval(remedy, {"state": prefixed}), weights())


def test_no_prefix_is_named_where_the_names_differ_otherwise():
    other = {f"model.{key}": value for key, value in weights().items() if key != "0.bias"}
    with pytest.raises(ModeconnError) as caught:
        state.match([weights(), other], ["a", "b"])
    assert "begins with" not in str(caught.value)


# -----------------------------------------------------------------------------------------------
# check


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"w": torch.tensor(0.0, dtype=torch.float64)},
        {
            "w": torch.tensor(
                [torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max, 1e-45]
            )
        },
        {"w": torch.empty(0)},
        {"steps": torch.tensor(3), "weight": torch.tensor(3)},  # a counter may be called anything
        {
            "attention.mask": torch.ones(2, 2, dtype=torch.bool),
            "relative_position_index": torch.arange(4),
        },
    ],
)
def test_usable_states_pass(entries: state.State):
    state.check({**weights(), **entries}, "a")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (
            {"w": torch.tensor([1.0, float("nan")])},
            ["1 of 10", "'w' has 1 NaN and 0 infinite of 2"],
        ),
        (
            {"w": torch.tensor([[float("inf"), -float("inf"), 0.0]])},
            ["'w' has 0 NaN and 2 infinite of 3"],
        ),
        ({"w": torch.tensor(float("nan"), dtype=torch.float64)}, ["'w' has 1 NaN"]),
        ({"w": torch.full((3, 2), -float("inf")).t()}, ["6 infinite of 6"]),
        (
            {f"w{i}": torch.tensor(float("nan")) for i in range(6)},
            ["6 of 15", "'w3'", "and 2 more"],
        ),
        (
            {"w": torch.ones(2).half()},
            ["'w' is torch.float16", "mc.load(file, dtype=torch.float32)"],
        ),
        ({"w": torch.ones(2).bfloat16()}, ["'w' is torch.bfloat16", "dtype=torch.float32"]),
        (
            {"w": torch.ones(2).to(torch.float8_e5m2)},
            ["'w' is torch.float8_e5m2", "dtype=torch.float32"],
        ),
        (
            {"w": torch.ones(2, dtype=torch.complex64)},
            ["'w' is torch.complex64", "float32 or float64"],
        ),
        ({"8.weight": torch.ones(2, 2).int()}, ["'8.weight' is torch.int32", "float32 or float64"]),
        ({"bias": torch.ones(2, dtype=torch.int8)}, ["'bias' is torch.int8"]),
        ({"w": torch.ones(2, device="meta")}, ["'w'", "meta"]),
        ({"w": torch.ones(2).to_sparse()}, ["'w' is torch.sparse_coo", "dense"]),
    ],
)
def test_unusable_entries_are_named(entries: state.State, words: list[str]):
    with refused("network.pt: ", *words):
        state.check({**weights(), **entries}, "network.pt")


def test_a_state_on_the_meta_device_is_refused():
    with refused("a: ", "'0.weight'", "meta", "no values"):
        state.check({key: value.to("meta") for key, value in weights().items()}, "a")


def test_entries_on_two_devices_are_refused():
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda", 1)

    moved = torch.ones(2).as_subclass(Elsewhere)
    with refused("a: ", "one device", "'0.weight' on cpu", "'w' on cuda:1"):
        state.check({**weights(), "w": moved}, "a")


def test_checking_takes_no_memory_of_the_weights_size():
    peak = 0
    big = {"w": torch.zeros(1 << 20)}
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        state.check(big, "a")
    for event in profile.events():
        peak = max(peak, event.self_cpu_memory_usage)
    assert peak < big["w"].nbytes / 100


# ------------------------------------------------------------------------------------------------
# save

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
]


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    shapes=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(DTYPES), st.booleans()),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_saved_is_loaded(tmp_path_factory, shapes):
    generator = torch.Generator().manual_seed(0)
    given = {}
    for name, (shape, dtype, transposed) in shapes.items():
        value = torch.randint(0, 2, shape, generator=generator).to(dtype)
        given[name] = value.mT if transposed and value.ndim >= 2 else value
    file = tmp_path_factory.getbasetemp() / "saved.safetensors"
    state.save(given, file)
    found = load_file(file)
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_special_values_keep_their_bits(tmp_path: Path):
    given = {"w": torch.tensor([-0.0, 1e-45, float("inf"), float("nan")])}
    state.save(given, tmp_path / "a.safetensors")
    assert_same(state.load(tmp_path / "a.safetensors"), given)


def test_tied_and_strided_tensors_are_saved_in_full(tmp_path: Path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"all": base, "again": base, "row": base[1], "turned": base.t(), "odd": base[:, ::2]}
    state.save(given, tmp_path / "a.safetensors")
    for name, value in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(value, given[name])


def test_parameters_are_saved_and_metadata_kept(tmp_path: Path):
    state.save(
        dict(network().named_parameters()), tmp_path / "a.safetensors", {"model": "mlp:4-3-2"}
    )
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "model": "mlp:4-3-2"}


def test_what_is_no_state_is_not_saved(tmp_path: Path):
    with refused("'epoch' is int"):
        state.save({"epoch": 3}, tmp_path / "a.safetensors")
    with refused("no entries"):
        state.save({}, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------- atomic
# writing


def test_a_file_is_replaced_by_the_new_content(tmp_path: Path):
    file = tmp_path / "a"
    atomic_write(file, lambda stream: stream.write(b"old"))
    with file.open("rb") as reader:
        atomic_write(file, lambda stream: stream.write(b"new and longer"))
        assert reader.read() == b"old"  # a reader in the middle of the file sees no mixture
    assert file.read_bytes() == b"new and longer"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_everything_as_it_was(
    tmp_path: Path, error: type[BaseException]
):
    file = tmp_path / "a"
    file.write_bytes(b"old")

    def write(stream):
        stream.write(b"half of the new")
        stream.flush()
        assert file.read_bytes() == b"old"
        raise error

    with pytest.raises(error):
        atomic_write(file, write)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == b"old"


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path):
    def write(stream):
        raise OSError(28, "No space left on device")

    with refused(str(tmp_path / "a"), "No space left on device"):
        atomic_write(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path):
    def write(stream):
        pytest.fail("nothing can be written here")

    with refused(str(tmp_path), "is a folder"):
        atomic_write(tmp_path, write)
    with refused("no folder", str(tmp_path / "missing")):
        atomic_write(tmp_path / "missing" / "a", write)
    (tmp_path / "file").touch()
    with refused("no folder", str(tmp_path / "file")):
        atomic_write(tmp_path / "file" / "a", write)


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "link", tmp_path / "disk" / "a"
    target.write_bytes(b"old")
    link.symlink_to(target)
    atomic_write(link, lambda stream: stream.write(b"new"))
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_permissions_are_those_of_any_new_file(tmp_path: Path):
    (tmp_path / "usual").write_bytes(b"")
    atomic_write(tmp_path / "a", lambda stream: stream.write(b""))
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode
