"""Damaged files of every format are refused in one line, or read to what was written.

Also: writing replaces regular files alone, by one writer at a time, and kills leave nothing behind.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import random
import subprocess
import sys
import threading
import zipfile
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
from modeconn import cli
from modeconn.connection.connection import CONTENT
from modeconn.data import datasets
from modeconn.errors import ModeconnError, SystemFailure
from modeconn.files.writing import atomic_write, locked, sweep
from modeconn.models import build
from modeconn.parameters import state
from modeconn.resuming import Record, claim
from modeconn.training import checkpoint
from modeconn.training.checkpoint import Snapshot
from refused import refused

# Fixtures.
made = connection_cases.made
saved = connection_cases.saved

MUTATIONS = 500
TENSORS = {
    "0.weight": torch.arange(12.0).reshape(3, 4),
    "0.bias": torch.tensor([1e-3, -2.0, 0.0]),
    "count": torch.tensor(7),
}


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


def result() -> mc.PathResult:
    t = np.linspace(0, 1, 5)
    columns = {"loss": np.array([0.1, 2, np.inf, np.nan, 1e-300]), "error": t / 3}
    return mc.PathResult(t, columns, 10, 1, "native", 0.5, {"torch": "2", "threads": 2, "x": 0.5})


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


def trained(file: Path, *more: str) -> int:
    spec = "train --model mlp:64-8x1-10 --data digits --limit 300 --epochs 3 --to-the-end --quiet"
    return cli.main([*spec.split(), "--out", str(file), *more])


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


# ---------------------------------------------------------------- small files, large demands


def test_a_packed_file_is_not_unpacked_beyond_its_header(tmp_path: Path):
    header = bytes((0, 0, 8, 3)) + b"".join(n.to_bytes(4, "big") for n in (2, 28, 28))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 2, 1, 2)))
    file.write_bytes(gzip.compress(header + bytes(50_000_000)))
    with refused("more bytes; expected 1,584", str(file)):
        datasets.load("mnist", tmp_path)
    huge = bytes((0, 0, 8, 3)) + b"\xff" * 12
    file.write_bytes(gzip.compress(huge + bytes(100)))
    with refused("at most", str(file)):
        datasets.load("mnist", tmp_path)


def test_an_archive_that_unpacks_to_more_is_refused(tmp_path: Path):
    torch.save(TENSORS, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as given,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in given.namelist():
            packed.writestr(name, given.read(name))
    with refused("compressed members"):
        state.load(tmp_path / "b.pt")


def test_an_expanded_tensor_is_refused_by_its_storage(tmp_path: Path):
    torch.save({"weight": torch.zeros(1).expand(1 << 20, 1 << 12)}, tmp_path / "a.pt")
    with refused("'weight' [1048576, 4096]", "expanded from 4 in the file"):
        state.load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "spec",
    ["mlp:1x9999999999-3", "mlp:99999-90000-10", "gpt:layers=99999999", "vit:layers=1000000"],
)
def test_specs_of_gigabytes_are_refused_with_the_reason(spec: str):
    with refused("expected at most", repr(spec)):
        build(spec)


def test_a_checkpoint_that_names_a_larger_model_is_refused_before_it_is_built(
    tmp_path: Path, capsys, monkeypatch
):
    small = {"0.weight": torch.zeros(3, 64), "0.bias": torch.zeros(3)}
    state.save(small, tmp_path / "a.safetensors", {"model": "mlp:64-5000x8-10"})
    monkeypatch.chdir(tmp_path)
    devices: list[str] = []

    def noting(spec: str) -> torch.nn.Module:
        devices.append(torch.get_default_device().type)
        return build(spec)

    monkeypatch.setattr("modeconn.models.build", noting)
    assert cli.main(["evaluate", "a.safetensors", "a.safetensors", "--data", "digits"]) == 2
    assert "'0.weight' is [3, 64], expected [5000, 64]" in capsys.readouterr().err
    assert devices == ["meta"]


# ---------------------------------------------------------------- writing


def test_pipes_and_devices_are_written_into(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    atomic_write(pipe, lambda stream: stream.write(b"whole"))
    reader.join()
    assert received == [b"whole"] and pipe.is_fifo()
    device = Path(os.devnull).stat()
    atomic_write(os.devnull, lambda stream: stream.write(b"whole"))
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    result().save(tmp_path / "r.json")
    atomic_write(link, lambda stream: stream.write(b"whole"))
    assert Path(os.devnull).stat().st_rdev == device.st_rdev and link.is_symlink()


def test_links_in_a_circle_and_sockets_are_refused(tmp_path: Path):
    import socket

    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with refused(str(tmp_path / "a")):
        atomic_write(tmp_path / "a", lambda stream: stream.write(b""))
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "s"))
        with refused("is a socket"):
            atomic_write(tmp_path / "s", lambda stream: stream.write(b""))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "s"]


def test_a_failure_of_the_system_is_told_from_bad_input(tmp_path: Path):
    with pytest.raises(SystemFailure, match="No space left"):
        atomic_write("/dev/full", lambda stream: stream.write(b"x"))
    assert issubclass(SystemFailure, ModeconnError)


def test_a_target_has_one_writer(tmp_path: Path):
    file = tmp_path / "a"
    with locked(file):
        with refused(f"{file} is being written by another command"), locked(file):
            pytest.fail("two hold it")
        with locked(tmp_path / "b"):
            pass
    with locked(file):
        pass
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from modeconn.files.writing import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_with_its_process(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    command = [sys.executable, "-c", HOLD, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert trained(file) == 2
        holder.kill()
    assert trained(file) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_temporaries_of_all_outputs_are_swept(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    for name in (file.name, f"{file.name}.training", "j.json"):
        (tmp_path / f".{name}.0123abcd.tmp").write_bytes(b"half")
    (tmp_path / ".mine.0123abcd.tmp").write_bytes(b"of another name")
    assert trained(file, "--json", str(tmp_path / "j.json")) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".mine.0123abcd.tmp", file.name, "j.json"]


def test_a_lone_temporary_of_a_claimed_folder_is_swept(tmp_path: Path):
    for name in (".search.json.1234abcd.tmp", ".fit-001.safetensors.1234abcd.tmp"):
        (tmp_path / name).write_bytes(b"{")
    claim(tmp_path, "search.json", "search", {"seed": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def test_what_is_swept_is_no_folder_of_a_living_writer(tmp_path: Path):
    content = io.BytesIO(b"x" * 10)

    def write(stream) -> None:
        stream.write(content.getvalue())
        stream.flush()
        sweep(tmp_path / "a")

    atomic_write(tmp_path / "a", write)
    assert (tmp_path / "a").read_bytes() == content.getvalue()


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> list[str]:
    """Two checkpoints that say which model they are of."""
    files = []
    for seed in (1, 2):
        files.append(str(tmp_path_factory.mktemp("ends") / f"{seed}.safetensors"))
        torch.manual_seed(seed)
        state.save(build("mlp:64-16x2-10").state_dict(), files[-1], {"model": "mlp:64-16x2-10"})
    return files


def line(ends: list[str], *more: str) -> list[str]:
    return ["evaluate", *ends, "--data", "digits", "--limit", "100", "--points", "3", *more]


def connecting(ends: list[str], folder: Path) -> list[str]:
    data = ["--data", "digits", "--limit", "100"]
    return ["connect", *ends, *data, "--target", "9", "--out", str(folder), "--quiet"]


def test_connect_finishes_after_a_kill_in_its_first_write_or_before_cleaning_up(
    ends: list[str], tmp_path: Path, monkeypatch
):
    folder, partial = tmp_path / "c", tmp_path / "c.partial"
    partial.mkdir()
    (partial / ".search.json.1234abcd.tmp").write_text("{")

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modeconn.cli.connect.remove_folder", killed)
        assert cli.main(connecting(ends, folder)) == 130
    assert folder.exists() and partial.exists()
    assert cli.main(connecting(ends, folder)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert mc.Connection.load(folder).model == "mlp:64-16x2-10"
    assert cli.main(connecting(ends, folder)) == 2  # now it is a folder of the user's


def test_escape_codes_in_names_are_shown(ends: list[str], tmp_path: Path, capsys):
    file = tmp_path / "\x1b[2Ja.npz"
    assert cli.main(line(ends, "--save", str(file))) == 0
    assert cli.main(line([f"{tmp_path}/\x1b]0;x\x07none", ends[0]])) == 2
    assert cli.main(["inspect", ends[0], "--\x1b[31m"]) == 2
    printed = capsys.readouterr()
    assert "wrote" in printed.out and r"\x1b[2Ja.npz" in printed.out
    assert r"\x1b]0;x\x07none" in printed.err
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.parametrize("closed", [None, "closed"])
def test_without_a_standard_output_the_work_is_done(
    ends: list[str], tmp_path: Path, monkeypatch, capsys, closed: str | None
):
    stream = None
    if closed:
        stream = io.StringIO()
        stream.close()
    file = tmp_path / "r.npz"
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(line(ends, "--save", str(file))) == 0
    assert cli.main(line(ends, "--json", "-")) == 1
    assert sys.stdout is stream
    assert "standard output is closed" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(line(ends, "--save", str(file))) == 0
    assert mc.PathResult.load(file).samples == 100


def test_sigterm_is_taken_as_an_interrupt(ends: list[str], tmp_path: Path, monkeypatch, capsys):
    import signal

    from modeconn.evaluation import resume

    done, before = resume.Stage.done, signal.getsignal(signal.SIGTERM)

    def terminated(self, sums) -> None:
        done(self, sums)
        os.kill(os.getpid(), signal.SIGTERM)

    file = tmp_path / "r.npz"
    with monkeypatch.context() as patch:
        patch.setattr(resume.Stage, "done", terminated)
        assert cli.main(line(ends, "--save", str(file), "--batch-size", "50")) == 143
    text = capsys.readouterr().err
    assert f"what is done is in {file}.unfinished: the same command goes on from there" in text
    assert signal.getsignal(signal.SIGTERM) == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz.unfinished"]
    assert cli.main(line(ends, "--save", str(file), "--batch-size", "50")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]


def test_an_interrupt_says_what_was_written(ends: list[str], tmp_path: Path, monkeypatch, capsys):
    file = tmp_path / "r.npz"

    def interrupted(result) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modeconn.cli.output.print_result", interrupted)
    assert cli.main(line(ends, "--save", str(file))) == 130
    assert f"interrupted; written: {file}" in capsys.readouterr().err


def test_json_onto_a_pipe_goes_into_it(ends: list[str], tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[str] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    assert cli.main(line(ends, "--json", str(pipe), "--quiet")) == 0
    reader.join()
    assert pipe.is_fifo() and json.loads(received[0])["samples"] == 100


def test_a_second_command_on_one_file_is_told_so(ends: list[str], tmp_path: Path, capsys):
    file = tmp_path / "r.npz"
    with locked(file):
        assert cli.main(line(ends, "--save", str(file))) == 2
    assert "is being written by another command" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
