"""Folders of save_pretrained wherever a checkpoint is taken: shards, ties, prefixes, damage."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import modeconn as mc
from folder_cases import IDS, blended, completed, folder, loss_of, state_of, tiny
from modeconn import cli
from refused import refused
from state_cases import assert_same

FORMS = ["safetensors", "bin", "shards", "bin shards"]


def losses(model: nn.Module, path: object, points: list[float], **options: object) -> list[float]:
    result = mc.evaluate(model, path, (IDS, IDS), points, loss="next_token", **options)
    return result.loss.tolist()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_line_between_folders(form: str, dtype: torch.dtype, tmp_path: Path, recwarn):
    states = [{k: v.to(dtype) for k, v in state_of(seed).items()} for seed in (0, 1)]
    files = [folder(tmp_path / f"{i}", state, form) for i, state in enumerate(states)]
    assert_same(mc.load(files[0]), states[0]) if dtype == torch.float32 else None
    path = mc.Line(*files)
    found = losses(tiny(2), path, [0.0, 0.3, 1.0])
    whole = [completed(state) for state in states]
    expected = [loss_of(blended(*whole, t)) for t in (0.0, 0.3, 1.0)]
    assert found == pytest.approx(expected, rel=1e-5)
    for t, state in zip((0.0, 1.0), whole):
        ends = path.at(t)
        assert ends.keys() == state.keys()
        assert all(torch.equal(ends[key], state[key].float()) for key in state)
    assert not recwarn.list


def test_names_that_one_file_leaves_out_are_asked_for_before_they_are_written(tmp_path: Path):
    state = {key: value.clone() for key, value in completed(state_of(0)).items()}
    whole = folder(tmp_path / "a", state)
    path, file = mc.Line(whole, folder(tmp_path / "b", state_of(1))), tmp_path / "line.safetensors"
    for call in (lambda: path.at(0.5), lambda: path.save(file)):
        with refused("'out.weight'", "evaluate on the module fills in tied names"):
            call()
    assert not file.exists()
    losses(tiny(2), path, [0.0])
    path.save(file)
    assert_same(mc.load_path(file).at(1.0), path.at(1.0))


def test_two_tensors_under_tied_names_make_an_untied_line(tmp_path: Path):
    states = [state_of(0, tied=False), completed(state_of(1))]
    files = [folder(tmp_path / "a", states[0]), folder(tmp_path / "b", state_of(1))]
    model = tiny(2)
    for path in (mc.Line(*files), mc.Line(*states), mc.Mixture(files)):
        points = [[1, 0], [0.6, 0.4], [0, 1]] if path.dim == 2 else [0.0, 0.4, 1.0]
        with pytest.warns(UserWarning, match="'embed.weight' and 'out.weight', which the model"):
            found = losses(model, path, points)
        expected = [loss_of(blended(*states, t)) for t in (0.0, 0.4, 1.0)]
        assert found == pytest.approx(expected, rel=1e-5)
    assert model.out.weight is model.embed.weight
    with pytest.warns(UserWarning, match="ties"):
        outputs = mc.forward(model, mc.Line(*files), [0.0], IDS)
    untied = tiny(3, tied=False)
    untied.load_state_dict(states[0])
    torch.testing.assert_close(outputs[0], untied(IDS))


def test_a_name_that_the_model_does_not_tie_is_not_filled_in(tmp_path: Path):
    files = [folder(tmp_path / "a", state_of(0)), folder(tmp_path / "b", state_of(1, tied=False))]
    path = mc.Line(*files)
    with refused("'out.weight' is missing"):
        losses(tiny(2, tied=False), path, [0.0])
    with refused("does not match", "'out.weight'"):
        path.at(0.5)


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "module.", "_orig_mod.model."])
def test_prefixes_are_taken_off_where_that_is_one_to_one(prefix: str, tmp_path: Path):
    files = []
    for i in (0, 1):
        named = {prefix + key: value for key, value in state_of(i).items()}
        more = {"current_model_state": dict(named), "averaging_state": {"n_averaged": 3}}
        torch.save({"state_dict": named, "epoch": 3, **(more if i else {})}, tmp_path / f"{i}.ckpt")
        files.append(tmp_path / f"{i}.ckpt")
    with pytest.warns(UserWarning, match="'state_dict' is taken, and not 'current_model_state'"):
        path = mc.Line(*files)
    found = losses(tiny(2), path, [0.0, 1.0])
    assert found == pytest.approx([loss_of(completed(state_of(i))) for i in (0, 1)], rel=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert mc.same_function(_loaded(1), files[1], (IDS, IDS)).same


def _loaded(seed: int) -> nn.Module:
    model = tiny(5)
    model.load_state_dict(completed(state_of(seed)))
    return model


def test_parts_of_wrappers_within_names_are_left_out(tmp_path: Path):
    named = {f"model._orig_mod.{key}": value for key, value in state_of(0).items()}
    torch.save(named, tmp_path / "a.pt")
    found = losses(tiny(2), mc.Line(tmp_path / "a.pt", folder(tmp_path / "b", state_of(1))), [0.0])
    assert found == pytest.approx([loss_of(completed(state_of(0)))], rel=1e-5)


def test_what_is_left_over_is_listed(tmp_path: Path):
    named = {f"model.{key}": value for key, value in state_of(0).items()}
    torch.save({"state_dict": {**named, "loss.weight": torch.ones(3)}}, tmp_path / "a.ckpt")
    path = mc.Line(tmp_path / "a.ckpt", tmp_path / "a.ckpt")
    with refused("without 'model.'", "in 1 entry: 'loss.weight' [3] is not expected"):
        losses(tiny(2), path, [0.0])


def test_a_base_model_within_another(tmp_path: Path):
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = tiny(3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.transformer(ids)

    files = [folder(tmp_path / f"{i}", state_of(i)) for i in (0, 1)]
    found = losses(Head(), mc.Line(*files), [1.0])
    assert found == pytest.approx([loss_of(completed(state_of(1)))], rel=1e-5)


# -- what is damaged, or something else ------------------------------------------------------------


@pytest.mark.parametrize("form", ["shards", "bin shards"])
def test_a_shard_that_is_missing_or_truncated_is_named(form: str, tmp_path: Path):
    path = folder(tmp_path / "a", state_of(0), form)
    shard = sorted(path.glob("*00002-of*"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with refused(str(shard), "truncated"):
        mc.load(path)
    shard.unlink()
    with refused("1 of its 3 shards are missing", shard.name):
        mc.load(path)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"embed.weight": "../model.safetensors"}, "has no weight_map of names to files"),
        ({}, "has no weight_map"),
        ({"other": "model-00001-of-00003.safetensors"}, "lacks 'other'"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(place: dict[str, str], said: str, tmp_path: Path):
    path = folder(tmp_path / "a", state_of(0), "shards")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": place}))
    with refused(str(path), said):
        mc.load(path)
    index.write_text('{"weight_map": ')
    with refused(index.name, "is no JSON"):
        mc.load(path)


QUANTISED = {
    "bitsandbytes": {"inner.weight.absmax": torch.ones(3), "inner.weight": torch.ones(3)},
    "GPTQ or AWQ": {"inner.qweight": torch.ones(2, 2), "inner.scales": torch.ones(2)},
    "compressed-tensors": {
        "inner.weight_packed": torch.ones(2),
        "inner.weight_scale": torch.ones(2),
    },
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_weights_are_refused_by_name(method: str, tmp_path: Path):
    state = {**state_of(0), **QUANTISED[method]}
    path = folder(tmp_path / "a", state)
    for source in (path, state, path / "model.safetensors"):
        with refused(f"quantised by {method}", "'inner."):
            mc.load(source)
    told = folder(tmp_path / "b", state_of(0), quantization_config={"quant_method": "awq"})
    with refused("quantization_config, awq"):
        mc.load(told)
    found = mc.check(path, folder(tmp_path / "c", state_of(0)))
    assert [each.name for each in found.findings if not each.passed] == ["quantised"]


def test_vocabularies_that_differ(tmp_path: Path):
    longer = {**state_of(1), "embed.weight": torch.zeros(11, 8)}
    files = [folder(tmp_path / "a", state_of(0)), folder(tmp_path / "b", longer)]
    with refused("'embed.weight' is [11, 8], expected [9, 8]"):
        mc.Line(*files)


def test_other_folders(tmp_path: Path):
    (tmp_path / "epoch").mkdir()
    torch.save(state_of(0), tmp_path / "last.ckpt")
    with refused("is a folder without model.safetensors", "last.ckpt"):
        mc.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused("is the folder of an adapter", "mc.lora(base"):
        mc.load(tmp_path)


# -- distributed checkpoints -----------------------------------------------------------------------


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    model = tiny(0, tied=False)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "step": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {"model": model.state_dict(), "optim": optimizer}
        checkpoint.save({"app": content}, checkpoint_id=tmp_path / "d", no_dist=True)
    return tmp_path / "d"


def test_a_distributed_checkpoint(distributed: Path):
    assert_same(mc.load(distributed), state_of(0, tied=False))
    shard = next(distributed.glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-300])
    with refused(str(shard), "truncated or damaged"):
        mc.load(distributed)
    shard.unlink()
    with refused("1 of its 1 shards are missing", shard.name):
        mc.load(distributed)


def test_metadata_that_would_run_code_is_refused(distributed: Path, tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    (distributed / ".metadata").write_bytes(pickle.dumps(Evil()))
    with refused(".metadata", "could run code"):
        mc.load(distributed)
    assert not (tmp_path / "ran").exists()


# -- from the command line -------------------------------------------------------------------------


def test_the_command_line_takes_folders(tmp_path: Path, capsys):
    assert cli.main(["inspect", str(folder(tmp_path / "a", state_of(0), "shards"))]) == 0
    assert "embed.weight" in capsys.readouterr().out
    bare = tmp_path / "bare"
    bare.mkdir()
    line = ["evaluate", str(tmp_path / "a"), str(bare), "--data", "digits"]
    assert cli.main(line) == 2
    assert "bare: a folder, not a checkpoint" in capsys.readouterr().err
    for spec, said in ((f"hf:{bare}", "has no config.json"), ("hf:none", "none is no folder")):
        line = ["evaluate", *[str(tmp_path / "a")] * 2, "--data", "digits", "--model", spec]
        assert cli.main(line) == 2
        assert said in capsys.readouterr().err
