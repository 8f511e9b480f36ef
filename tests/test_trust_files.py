"""Damaged files of every format are refused in one line, or read to what was written."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import connection_cases
import modeconn as mc
from file_cases import TENSORS, result, trained
from modeconn.connection.connection import CONTENT
from modeconn.data import datasets
from modeconn.errors import ModeconnError
from modeconn.parameters import state
from modeconn.resuming import Record, claim
from modeconn.training import checkpoint
from modeconn.training.checkpoint import Snapshot
from refused import refused

# Fixtures.
made = connection_cases.made
saved = connection_cases.saved

MUTATIONS = 500


def flat(value: Any) -> Any:
    """Anything that a reader returns, to compare bit for bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), list(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), list(value.shape), value.tobytes()
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, (list, tuple)) else repr(value)


# ---------------------------------------------------------------- mutations


def bytes_changed(raw: bytes, draw: random.Random) -> bytes:
    """Flip bits, cut, put in, double or clear a stretch."""
    changed, kind = bytearray(raw), draw.randrange(6)
    at = draw.randrange(len(raw)) if draw.random() < 0.5 else draw.randrange(min(300, len(raw)))
    if kind <= 1:
        for _ in range(draw.choice((1, 1, 1, 2, 5))):
            changed[draw.randrange(len(raw)) if draw.random() < 0.5 else at] ^= 1 << draw.randrange(
                8
            )
    elif kind == 2:
        del changed[at:]
    elif kind == 3:
        changed[at:at] = draw.randbytes(draw.choice((1, 8, 100)))
    elif kind == 4:
        del changed[at : at + draw.choice((1, 8, 100))]
    else:
        changed[at : at + draw.choice((1, 4, 64))] = bytes(4)
    return bytes(changed)


STRANGE = [
    None,
    True,
    -1,
    0,
    10**30,
    0.5,
    float("nan"),
    "nan",
    "",
    [],
    {},
    [[]],
    {"a": 1},
    "\x1b[2J",
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def json_changed(content: Any, draw: random.Random) -> str:
    """Swap a value for one of another type, add or drop a key, or nest it deeply."""
    changed = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 2))):
        everywhere = places(changed)
        if not everywhere:
            break
        container, key = draw.choice(everywhere)
        kind = draw.randrange(4)
        if kind == 0 and isinstance(container, dict):
            container[f"more {draw.randrange(9)}"] = copy.deepcopy(draw.choice(STRANGE))
        elif kind == 1:
            del container[key]
        else:
            container[key] = copy.deepcopy(draw.choice(STRANGE))
    text = json.dumps(changed)
    return text if draw.random() < 0.98 else "[" * 100_000


def header_changed(raw: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header, or the description in its metadata, has another content."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    record = header.get("__metadata__", {}).get("record")
    if record is not None and draw.random() < 0.7:
        header["__metadata__"]["record"] = json_changed(json.loads(record), draw)
        text = json.dumps(header)
    else:
        text = json_changed(header, draw)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + raw[8 + size :]


def in_turn(*ways: Callable[[bytes, random.Random], bytes]) -> Callable[..., bytes]:
    return lambda raw, draw: draw.choice(ways)(raw, draw)


def whole_json(raw: bytes, draw: random.Random) -> bytes:
    return json_changed(json.loads(raw), draw).encode()


def survive(
    file: Path,
    read: Callable[[], Any],
    change: Callable[..., bytes],
    exact: bool = True,
    mark: bytes = b"",
) -> int:
    """Read mutations of a file; return how many were refused.

    Args:
        exact: what is read must be what was written; otherwise only no other error is raised.
        mark: where a mutation destroys this name of the digest, the file is as good as a foreign
            one, without a digest.
    """
    raw, expected = file.read_bytes(), flat(read())
    draw, refusals = random.Random(18), 0
    for number in range(MUTATIONS):
        changed = change(raw, draw)
        file.write_bytes(changed)
        try:
            found = flat(read())
        except ModeconnError as refusal:
            message = str(refusal)
            refusals += 1
        else:
            message = ""
            assert not exact or mark not in changed or found == expected, (number, changed[:400])
        assert "\n" not in message, (number, message)
    file.write_bytes(raw)
    return refusals


def test_mutations_of_safetensors(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    state.save(TENSORS, file, {"model": "mlp:4-3"})
    change = in_turn(bytes_changed, header_changed)
    mark = b"modeconn.sha256"
    read = lambda: dict(sorted(state.load(file).items()))  # noqa: E731 - as short as it is
    assert survive(file, read, change, mark=mark) > 350


def test_mutations_of_pt(tmp_path: Path):
    file = tmp_path / "a.pt"
    torch.save(TENSORS, file)
    assert survive(file, lambda: state.load(file), bytes_changed) > 200


def test_mutations_of_results(tmp_path: Path):
    for name, change in (("r.npz", bytes_changed), ("r.json", in_turn(bytes_changed, whole_json))):
        file = tmp_path / name
        result().save(file)
        # info is text for a reader, and barriers are computed anew
        assert survive(file, lambda file=file: vars(mc.PathResult.load(file)), change) > 200


def test_mutations_of_records(tmp_path: Path):
    file = tmp_path / "r"
    settings = {"loss": "mse", "shape": [2, 3], "rate": 0.1}
    record = Record(file, "unfinished evaluation", settings)
    record.write(TENSORS, {"evaluation": {"parts": 3, "rows": 10}})
    change = in_turn(bytes_changed, header_changed)

    def read() -> Any:
        tensors, kept = record.read()
        return dict(sorted(tensors.items())), kept

    assert survive(file, read, change) > 400


def test_mutations_of_training_states(tmp_path: Path):
    record = Record(tmp_path / "a.training", "unfinished training", {"lr": 0.1})
    model = {key: value for key, value in TENSORS.items() if key != "count"}
    checkpoint.save(Snapshot(3, 0.25, model, model, "digest"), record)

    def read() -> Any:
        found = checkpoint.load(record)
        parts = (dict(sorted(part.items())) for part in (found.weights, found.momentum))
        return found.epoch, found.error, *parts, found.network

    assert survive(record.file, read, in_turn(bytes_changed, header_changed)) > 400


def test_mutations_of_claimed_folders(tmp_path: Path):
    settings = {"seed": 1, "sums": [1.0, 2.0], "name": "x"}
    claim(tmp_path / "s", "s.json", "search", settings)

    def read() -> None:
        claim(tmp_path / "s", "s.json", "search", settings, approximate=("sums",))

    survive(tmp_path / "s" / "s.json", read, in_turn(bytes_changed, whole_json))


def test_mutations_of_connections(saved: Path):
    def read() -> Any:
        found = mc.Connection.load(saved)
        return found.kinds, found.certificate.to_dict(), found.model, found.details

    change = in_turn(bytes_changed, whole_json)
    assert survive(saved / CONTENT, read, change) > 400


def pixels(count: int) -> bytes:
    return np.random.RandomState(0).randint(0, 256, count).astype(np.uint8).tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_mutations_of_idx_files(tmp_path: Path, packed: bool):
    """Packed ones have a sum; the others can only be refused by their sizes and labels."""
    pack = (lambda raw: gzip.compress(raw, mtime=0)) if packed else bytes
    images = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (3, 28, 28))
    ending = ".gz" if packed else ""
    file = tmp_path / f"train-images-idx3-ubyte{ending}"
    file.write_bytes(pack(images + pixels(3 * 784)))
    labels = bytes((0, 0, 8, 1)) + (3).to_bytes(4, "big") + bytes((1, 2, 9))
    (tmp_path / f"train-labels-idx1-ubyte{ending}").write_bytes(pack(labels))

    def read() -> Any:
        found = datasets.load("mnist", tmp_path)
        return found.inputs, found.targets

    assert survive(file, read, bytes_changed, exact=packed) > 150


def test_mutations_of_cifar_files(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(datasets, "_CIFAR_IMAGES", 3)
    file = tmp_path / "test_batch.bin"
    file.write_bytes(b"".join(bytes((label,)) + pixels(3072) for label in (1, 5, 9)))

    def read() -> Any:
        found = datasets.load("cifar10", tmp_path, "test")
        return found.inputs, found.targets

    assert survive(file, read, bytes_changed, exact=False) > 150


# ---------------------------------------------------------------- known cases


def test_a_bit_of_a_weight_in_a_pt_file(tmp_path: Path):
    torch.manual_seed(0)
    module, file = torch.nn.Linear(64, 64), tmp_path / "a.pt"
    torch.save(module.state_dict(), file)
    raw = bytearray(file.read_bytes())
    raw[raw.find(module.weight.detach().numpy().tobytes()[:64]) + 3] ^= 0x40
    file.write_bytes(raw)
    with refused("truncated or damaged", "CRC-32", str(file)):
        state.load(file)


def interrupted_training(file: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        from modeconn.training.loop import Loop

        epoch = Loop._epoch

        def once(self, data) -> None:
            epoch(self, data)
            raise KeyboardInterrupt

        patch.setattr(Loop, "_epoch", once)
        assert trained(file) == 130
    return checkpoint.training_file(file)


def test_changed_training_states_are_refused_or_the_same(tmp_path: Path, capsys):
    file, reference = tmp_path / "t.safetensors", tmp_path / "r.safetensors"
    assert trained(reference) == 0
    kept = interrupted_training(file)
    raw, tensors = kept.read_bytes(), load_file(kept)
    with safe_open(kept, framework="pt") as archive:
        about = json.loads(archive.metadata()["record"])
    texts = ["[]", '"nan"', "[" * 100_000, json.dumps({**about, "settings": -1})]
    changes = ({"epoch": "nan"}, {"epoch": -1}, {"epoch": True}, {"error": "x"}, {"epoch": 2})
    texts += [json.dumps({**about, "state": {**about["state"], **each}}) for each in changes]
    cases = [(tensors, text) for text in texts]
    whole = json.dumps(about)
    cases.append(({f"other.{key}": value for key, value in tensors.items()}, whole))
    cases.append(({k: v for k, v in tensors.items() if "momentum.0" not in k}, whole))
    cases.append(({key: value + 0.5 for key, value in tensors.items()}, whole))
    capsys.readouterr()
    for content, text in cases:
        save_file(content, kept, {"record": text})
        assert trained(file, "--resume") == 2, text[:200]
        assert capsys.readouterr().err.count("\n") == 1
        assert not file.exists()
    kept.write_bytes(raw)
    assert trained(file, "--resume") == 0
    for key, value in load_file(reference).items():
        assert torch.equal(value, load_file(file)[key])
