"""mc.check and `modeconn check`: what makes two checkpoints ends of one path, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import modeconn as mc
from folder_cases import IDS, Tiny, folder, state_of, tiny
from modeconn import cli
from modeconn.parameters.configs import differences
from refused import refused


def failed(found: mc.Comparison) -> list[str]:
    return [f"{each.name}: {each.text}" for each in found.findings if not each.passed]


def test_two_folders_that_fit(tmp_path: Path, capsys):
    a, b = (folder(tmp_path / name, state_of(i)) for i, name in enumerate("ab"))
    found = mc.check(a, b)
    assert found.passed, str(found)
    distance = (state_of(0)["inner.weight"] - state_of(1)["inner.weight"]).double().square().sum()
    distance += (state_of(0)["inner.bias"] - state_of(1)["inner.bias"]).double().square().sum()
    (inner,) = [each for each in found.layers if each.layer == "inner"]
    assert inner.distance == pytest.approx(float(distance) ** 0.5, rel=1e-6)
    assert (inner.equal, inner.tensors) == (0, 2)
    assert cli.main(["check", str(a), str(b), "--json", "-"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["passed"]
    assert [each["layer"] for each in written["layers"]] == ["embed", "inner"]
    assert cli.main(["check", str(a), str(b)]) == 0
    assert "✓ config" in capsys.readouterr().out


CHANGES = {
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "norm_eps": 1e-6,
    "hidden_act": "gelu_new",
    "num_attention_heads": 4,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("key", CHANGES)
def test_entries_that_change_the_forward(key: str, tmp_path: Path, capsys):
    a = folder(tmp_path / "a", state_of(0))
    b = folder(tmp_path / "b", state_of(1), **{key: CHANGES[key]})
    (text,) = failed(mc.check(a, b))
    assert text.startswith(f"config: {key}")
    assert cli.main(["check", str(a), str(b), "--quiet"]) == 3
    assert cli.main(["check", str(a), str(b), "--quiet", "--ignore", key]) == 0
    path = mc.Line(a, b)
    with refused("are different functions of their weights", key, f"ignore=('{key}"):
        mc.evaluate(tiny(2), path, (IDS, IDS), 2, loss="next_token")
    mc.evaluate(tiny(2), path, (IDS, IDS), 2, loss="next_token", ignore=(key,))


def test_entries_that_no_forward_reads(tmp_path: Path):
    more = {"torch_dtype": "bfloat16", "_name_or_path": "x", "attention_dropout": 0.1}
    more |= {"transformers_version": "5", "use_cache": False, "pad_token_id": 3}
    a = folder(tmp_path / "a", state_of(0))
    assert mc.check(a, folder(tmp_path / "b", state_of(1), **more)).passed


def test_padding_counts_for_heads_that_look_for_it():
    configs = [
        {"architectures": ["TinyForSequenceClassification"], "pad_token_id": i} for i in (0, 1)
    ]
    assert differences(*configs) == {"pad_token_id": (0, 1)}
    for key in ("output_stride", "output_logit_soft_cap"):  # of MobileNet, of xLSTM
        assert differences({key: 8}, {key: 16}) == {key: (8, 16)}
    assert not differences({"output_attentions": True}, {"output_attentions": False})
    nested = [{"text_config": {"rope_theta": i, "dtype": str(i)}} for i in (1, 2)]
    assert differences(*nested) == {"text_config.rope_theta": (1, 2)}


def test_names_shapes_and_values(tmp_path: Path):
    a = folder(tmp_path / "a", state_of(0))
    state = {**state_of(1), "extra": torch.ones(2), "embed.weight": torch.ones(11, 8)}
    del state["inner.bias"]
    found = mc.check(a, folder(tmp_path / "b", state))
    texts = "\n".join(failed(found))
    for text in ("'extra' [2]", "'inner.bias' [8]", "is [9, 8] in a and [11, 8] in b"):
        assert text in texts
    assert not found.layers
    state = {**state_of(1), "inner.bias": torch.full((8,), torch.nan)}
    (text,) = failed(mc.check(state_of(0), state))
    assert "b is not finite in 'inner.bias'" in text
    (text,) = failed(mc.check(a, state_of(0)))
    assert "equal in every tensor" in text


def test_masks_and_large_values_are_what_a_path_takes():
    mask = torch.full((3, 3), -torch.inf).triu(1)
    large = torch.full((4,), 3e38)  # finite, and their sum is not
    states = [{**state_of(i), "mask": mask.clone(), "large": large * (i + 0.1)} for i in (0, 1)]
    states[1]["large"] = large
    assert mc.check(*states).passed, failed(mc.check(*states))
    mc.Line(*states)
    states[1]["mask"] = mask.triu(2)
    (text,) = [text for text in failed(mc.check(*states)) if "values: a" in text]
    assert text.endswith("a is not finite in 'mask'")


def test_dtypes_and_ties_are_said(tmp_path: Path):
    half = {key: value.bfloat16() for key, value in state_of(1, tied=False).items()}
    found = mc.check(tiny(0).state_dict(), half)
    texts = [each.text for each in found.findings]
    assert "float32 in a, bfloat16 in b; half precision is widened to float32" in texts
    assert any("tied in a alone: 'embed.weight' and 'out.weight'" in text for text in texts)
    assert found.passed


TOKENS = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": {"vocab": {"a": 1, "b": 0}}}, "2 of a have another number ('a': 0, 1 in b)"),
        ({"added_tokens": [{"id": 2, "content": "<pad>"}]}, "1 are in b alone"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "by other rules: pre_tokenizer"),
        ({}, ""),
    ],
)
def test_tokenizers(other: dict[str, object], said: str, tmp_path: Path):
    a, b = (folder(tmp_path / name, state_of(i)) for i, name in enumerate("ab"))
    (a / "tokenizer.json").write_text(json.dumps(TOKENS))
    (b / "tokenizer.json").write_text(json.dumps(TOKENS | other))
    texts = failed(mc.check(a, b))
    assert (said in texts[0]) if said else texts == []


def test_ends_are_run_as_their_own_models():
    a, b = tiny(0), tiny(1)
    found = mc.check(a, b, (IDS, IDS))
    assert found.passed
    assert sum(each.name == "outputs" for each in found.findings) == 2

    class Louder(Tiny):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(ids)

    torch.manual_seed(1)
    texts = failed(mc.check(a, Louder(), (IDS, IDS)))
    assert texts[0].startswith("architecture: a is Tiny, b is Louder")
    assert "not the same function" in texts[1]


def test_bad_input(tmp_path: Path, capsys):
    with refused("no such file"):
        mc.check(tmp_path / "none", state_of(0))
    with refused("data need an architecture"):
        mc.check(state_of(0), state_of(1), (IDS, IDS))
    with refused("ignore is 'norm_eps'"):
        mc.evaluate(tiny(0), mc.Line(tiny(0), tiny(1)), (IDS, IDS), 2, ignore="norm_eps")
    with refused("ignore is 'norm_eps'"):
        mc.check(state_of(0), state_of(1), ignore="norm_eps")
    assert cli.main(["check", "none", "none"]) == 2
    assert "none: no such file" in capsys.readouterr().err
