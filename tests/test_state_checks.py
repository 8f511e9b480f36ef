"""States that match, and states that can be used: each difference is named."""

from __future__ import annotations

import pytest
import torch

from modeconn.errors import ModeconnError
from modeconn.parameters import state
from refused import refused
from state_cases import assert_same, weights

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
