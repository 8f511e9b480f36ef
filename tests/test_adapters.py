"""mc.lora: PEFT adapters as ends of paths and in mixtures, by their formulas and by PEFT."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import modeconn as mc
from folder_cases import IDS, adapter, completed, folder, loss_of, state_of, tiny
from refused import refused


def factors(seed: int, rank: int = 2, module: str = "inner") -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, 8, generator=draw),
        f"{module}.lora_B.weight": torch.randn(8, rank, generator=draw),
    }


def delta(tensors: dict[str, Tensor], scaling: float = 1.5, other: dict | None = None) -> Tensor:
    a = (other or tensors)["inner.lora_A.weight"].double()
    return scaling * tensors["inner.lora_B.weight"].double() @ a


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 3 / 2),
        ({"use_rslora": True}, 3 / 2**0.5),
        ({"alpha_pattern": {"inner": 8}}, 4.0),
        ({"r": 4, "rank_pattern": {"in.*": 2}, "alpha_pattern": {"outer": 8}}, 1.5),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_one_adapter(config: dict[str, object], scaling: float, form: str, tmp_path: Path):
    base = completed(state_of(0))
    found = mc.lora(base, adapter(tmp_path / "a", factors(1), form, **config))
    expected = base["inner.weight"].double() + delta(factors(1), scaling)
    torch.testing.assert_close(found["inner.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    shared = [key for key in base if found[key].data_ptr() == base[key].data_ptr()]
    assert shared == [key for key in base if key != "inner.weight"]
    result = mc.evaluate(tiny(3), mc.Line(base, found), (IDS, IDS), [1.0], loss="next_token")
    right = loss_of({**base, "inner.weight": expected})
    assert result.loss[0] == pytest.approx(right, rel=1e-5)


def test_embeddings_convolutions_and_whole_tensors(tmp_path: Path):
    base = {"embed.weight": torch.randn(9, 8), "conv.weight": torch.randn(5, 3, 2, 2)}
    base |= {"head.weight": torch.randn(4, 8), "head.bias": torch.randn(4)}
    tensors = {
        "embed.lora_embedding_A": torch.randn(2, 9),
        "embed.lora_embedding_B": torch.randn(8, 2),
        "conv.lora_A.weight": torch.randn(2, 3, 2, 2),
        "conv.lora_B.weight": torch.randn(5, 2, 1, 1),
        "head.modules_to_save.weight": torch.randn(4, 8),
        "head.bias": torch.randn(4),
    }
    found = mc.lora(base, adapter(tmp_path / "a", tensors, modules_to_save=["head"]))
    product = tensors["embed.lora_embedding_B"] @ tensors["embed.lora_embedding_A"]
    torch.testing.assert_close(found["embed.weight"], base["embed.weight"] + 1.5 * product.t())
    x = torch.randn(1, 3, 6, 6)
    both = torch.conv2d(
        torch.conv2d(x, tensors["conv.lora_A.weight"]), tensors["conv.lora_B.weight"]
    )
    right = torch.conv2d(x, base["conv.weight"]) + 1.5 * both
    torch.testing.assert_close(torch.conv2d(x, found["conv.weight"]), right, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["head.weight"], tensors["head.modules_to_save.weight"])
    assert torch.equal(found["head.bias"], tensors["head.bias"])


def test_layers_whose_weights_are_transposed(tmp_path: Path):
    base = {"inner.weight": torch.randn(6, 10)}  # [in, out], as GPT-2 has it
    tensors = {"inner.lora_A.weight": torch.randn(2, 6), "inner.lora_B.weight": torch.randn(10, 2)}
    found = mc.lora(base, adapter(tmp_path / "a", tensors, fan_in_fan_out=True))
    product = tensors["inner.lora_B.weight"] @ tensors["inner.lora_A.weight"]
    torch.testing.assert_close(found["inner.weight"], base["inner.weight"] + 1.5 * product.t())


WEIGHTS = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.5, -0.7]]


@pytest.mark.parametrize("space", ["deltas", "factors"])
def test_a_path_of_two_adapters(space: str, tmp_path: Path):
    base = completed(state_of(0))
    pair = [factors(1), factors(2)]
    folders = [adapter(tmp_path / f"{i}", each, r=2) for i, each in enumerate(pair)]
    path = mc.lora(base, folders, space=space)
    result = mc.evaluate(tiny(3), path, (IDS, IDS), WEIGHTS, loss="next_token")
    for weights, loss in zip(WEIGHTS, result.loss):
        change = torch.zeros(8, 8, dtype=torch.float64)
        for i, k in itertools.product(range(2), repeat=2):
            if space == "factors":
                change += weights[i] * weights[k] * delta(pair[i], other=pair[k])
            elif i == k:
                change += weights[i] * delta(pair[i])
        right = loss_of({**base, "inner.weight": base["inner.weight"].double() + change})
        assert loss == pytest.approx(right, rel=2e-5)
    for i, row in ((0, [1.0, 0.0]), (1, [0.0, 1.0])):
        alone = mc.lora(base, folders[i])
        assert all(torch.equal(path.at([row])[key], alone[key]) for key in base)
    assert all(torch.equal(path.at([[0.0, 0.0]])[key], base[key]) for key in base)
    with refused("expected weights [T, 2], one for each adapter"):
        path.points(5)


def test_many_adapters_share_what_they_leave_alone(tmp_path: Path):
    folders = [adapter(tmp_path / f"{i}", factors(i)) for i in range(3)]
    path = mc.lora(completed(state_of(0)), folders)
    places = {point["embed.weight"].data_ptr() for point in path.control_points}
    assert len(places) == 1
    np.testing.assert_allclose(path.coefficients([[0.2, 0.3, 0.1]]), [[0.4, 0.2, 0.3, 0.1]])
    one = mc.lora(completed(state_of(0)), folders[:1])
    assert one.points(3).tolist() == [0.0, 0.5, 1.0]


# -- what is refused -------------------------------------------------------------------------------

KINDS = {
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "IA3": ({"peft_type": "IA3"}, "peft_type 'IA3': expected LORA"),
    "biases of B": ({"lora_bias": True}, "lora_bias is True"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "what is not known": ({"new_trick": {"k": 1}}, "new_trick is {'k': 1}"),
    "rank": ({"r": 4}, "rank 4 and alpha 3"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path):
    config, said = KINDS[kind]
    with refused(said):
        mc.lora(completed(state_of(0)), adapter(tmp_path / "a", factors(1), **config))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"inner.lora_magnitude_vector": torch.ones(8)}, "inner.lora_magnitude_vector"),
        ({"inner.weight": torch.ones(8, 8)}, "'inner.weight', which is not understood"),
        ({"embed.lora_A.weight": torch.ones(2, 8)}, "expected ['A', 'B']"),
        (factors(1, module="outer"), "it changes 'outer.weight'"),
        ({"out.lora_A.weight": torch.ones(2, 5), "out.lora_B.weight": torch.ones(9, 2)}, "[9, 8]"),
    ],
)
def test_tensors_that_do_not_fit(more: dict[str, Tensor], said: str, tmp_path: Path):
    with refused(said):
        mc.lora(completed(state_of(0)), adapter(tmp_path / "a", {**factors(1), **more}))


def test_adapters_of_another_base(tmp_path: Path):
    base = folder(tmp_path / "base", state_of(0), tie_word_embeddings=True)
    own = adapter(tmp_path / "a", factors(1), base_model_name_or_path="someone/base")
    other = adapter(tmp_path / "b", factors(2), base_model_name_or_path="someone/else")
    mc.lora(base, own)
    with refused("is an adapter of 'someone/else', and not of"):
        mc.lora(base, other)
    with refused("'someone/else' that another notes"):
        mc.lora(completed(state_of(0)), [own, other])
    mc.lora(base, [own, other], any_base=True)
    tensors = {
        "embed.lora_embedding_A": torch.ones(2, 9),
        "embed.lora_embedding_B": torch.ones(8, 2),
    }
    with refused("changes 'embed.weight', which the model may tie"):
        mc.lora(base, adapter(tmp_path / "c", tensors))
    with refused("'out.weight'", "pass that"):
        out = {"out.lora_A.weight": torch.ones(2, 8), "out.lora_B.weight": torch.ones(9, 2)}
        mc.lora(base, adapter(tmp_path / "d", out))
    found = mc.lora(tiny(0), tmp_path / "c")
    assert torch.equal(found["out.weight"], tiny(0).out.weight)


def test_factors_that_cannot_be_blended(tmp_path: Path):
    base = completed(state_of(0))
    folders = [adapter(tmp_path / f"{r}", factors(r, r), r=r) for r in (1, 2)]
    with refused("have ranks 1 and 2 at 'inner.weight'"):
        mc.lora(base, folders, space="factors")
    with refused("space is 'factors': expected \"deltas\" of one adapter"):
        mc.lora(base, folders[0], space="factors")
    with refused("adapters is empty"):
        mc.lora(base, [])
    (folders[0] / "adapter_model.safetensors").unlink()
    with refused("has neither adapter_model.safetensors"):
        mc.lora(base, folders[0])
    (folders[0] / "adapter_config.json").unlink()
    with refused("adapter_config.json: no such file"):
        mc.lora(base, folders[0])


def test_a_path_of_adapters_of_a_folder_fits_the_model(tmp_path: Path):
    base = folder(tmp_path / "base", state_of(0))
    path = mc.lora(base, [adapter(tmp_path / f"{i}", factors(i)) for i in range(2)])
    found = mc.evaluate(tiny(3), path, (IDS, IDS), [[0.0, 0.0]], loss="next_token")
    assert found.loss[0] == pytest.approx(loss_of(completed(state_of(0))), rel=1e-5)


# -- against PEFT itself ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gives_the_same(rslora: bool, tmp_path: Path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")

    def base():
        return transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")

    settings = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        use_rslora=rslora,
        target_modules=["c_attn", "c_proj"],
        rank_pattern={"h.0.attn.c_attn": 3},
        alpha_pattern={"h.1.mlp.c_proj": 7},
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    for i in range(2):
        torch.manual_seed(i + 1)
        peft.get_peft_model(base(), settings).save_pretrained(tmp_path / f"{i}")
    folders = [tmp_path / "0", tmp_path / "1"]
    for each in folders:
        merged = peft.PeftModel.from_pretrained(base(), each).merge_and_unload().state_dict()
        found = mc.lora(base(), each)
        for key, value in merged.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    if rslora:
        return  # PEFT scales what it concatenates by alpha / √r with alpha = r, which is not 1
    both = peft.PeftModel.from_pretrained(base(), folders[0], adapter_name="x")
    both.load_adapter(folders[1], adapter_name="y")
    both.add_weighted_adapter(["x", "y"], [0.7, 0.6], "sum", combination_type="cat")
    both.set_adapter("sum")
    merged = both.merge_and_unload(adapter_names=["sum"]).state_dict()
    found = mc.lora(base(), folders).at([[0.7, 0.6]])
    for key, value in merged.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
