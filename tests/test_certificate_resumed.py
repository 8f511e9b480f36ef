"""Certificates in the making are kept: after an interruption they go on, to the same numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import modeconn as mc
from certificate_cases import walk_of
from modeconn.connection.certificate import Certificate
from modeconn.connection.measurement import PlannedForward
from modeconn.connection.verification import Claims, certify
from modeconn.data.batches import as_batches
from modeconn.errors import ModeconnError
from modeconn.evaluation import progress
from walk import Walk

ROWS = 10  # of a batch; the data has 60


def certified(w: Walk, file: Path | None, **options: Any) -> Certificate:
    return certify(w.model, w.chain, w.path, options.pop("data", w.data), file=file, **options)


def interrupted(w: Walk, file: Path, batches: int) -> None:
    """Begins a certificate and stops it after some batches; the first write is due at once."""

    def stop(done: int, total: int | None) -> None:
        if done == batches * ROWS:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certified(w, file, batch_size=ROWS, progress=stop)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each batch that goes through the networks, but for the trial at first."""
    seen: list[int] = []
    forward = PlannedForward.__call__

    def counted(self: PlannedForward, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(PlannedForward, "__call__", counted)
    return seen


def test_it_goes_on_to_the_same_numbers(tmp_path, monkeypatch, calls):
    monkeypatch.setattr("modeconn.resuming.SECONDS_BETWEEN_WRITES", 0.0)
    w, file = walk_of("relu"), tmp_path / "certificate.safetensors"
    whole = certified(w, None, batch_size=ROWS)
    interrupted(w, file, 4)
    del calls[:]
    assert certified(w, file, batch_size=ROWS) == whole
    assert calls == [ROWS] * 3  # a trial, and two of six batches
    del calls[:]
    assert certified(w, file, batch_size=ROWS) == whole
    assert calls == []
    assert dataclasses.replace(whole, target=0.5) == certified(
        w, file, batch_size=ROWS, claims=Claims(target=0.5)
    )


def test_what_was_not_written_is_computed_again(tmp_path, calls):
    w, file = walk_of("relu"), tmp_path / "certificate.safetensors"
    interrupted(w, file, 4)  # within a few seconds the first batch alone is written
    del calls[:]
    assert certified(w, file, batch_size=ROWS) == certified(w, None, batch_size=ROWS)
    assert calls[:6] == [ROWS] * 6


def test_sums_of_something_else_are_refused(tmp_path):
    w, file = walk_of("relu"), tmp_path / "certificate.safetensors"
    interrupted(w, file, 2)
    x, y = w.data
    for data in ((x + 1, y), (x, (y + 1) % w.chain.classes), (x[:5], y[:5])):
        with pytest.raises(ModeconnError, match="holds sums over other data: remove it"):
            certified(w, file, batch_size=ROWS, data=data)
    with pytest.raises(ModeconnError, match="rows 10, not 20"):
        certified(w, file, batch_size=2 * ROWS)
    other = dataclasses.replace(w, points=[*w.points[:-1], w.points[-2]])
    with pytest.raises(ModeconnError, match="other path"):
        certified(other, file, batch_size=ROWS)
    with pytest.raises(ModeconnError, match="started with loss"):
        certified(w, file, batch_size=ROWS, claims=Claims(loss="soft_cross_entropy"))
    # Batches of another size end elsewhere than those that were kept.
    with pytest.raises(ModeconnError, match="rows 10, not 15"):
        certified(w, file, data=as_batches(w.data, 15))
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    with pytest.raises(ModeconnError, match="damaged"):
        certified(w, file, batch_size=ROWS)


def test_connect_goes_on_from_its_folder(tmp_path, monkeypatch, calls):
    """A search that ended, and a certificate that was interrupted."""
    monkeypatch.setattr("modeconn.resuming.SECONDS_BETWEEN_WRITES", 0.0)
    w, folder = walk_of("relu"), tmp_path / "partial"
    ends = w.path.control_points[0], w.path.control_points[-1]
    options: dict[str, Any] = {"target": 0.5, "subnetworks": "readout", "test": w.data}
    plain = mc.connect(w.model, *ends, w.data, **options)
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if line == "certificate of test data":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mc.connect(w.model, *ends, w.data, **options, folder=folder, log=stop)
    assert said[-2:] == ["certificate", "certificate of test data"]
    del calls[:]
    again = mc.connect(w.model, *ends, w.data, **options, folder=folder)
    assert again.certificate == plain.certificate
    assert again.test_certificate == plain.test_certificate
    assert len(calls) == 2  # of the test data alone


def test_progress_is_told_now_and_then(monkeypatch):
    clock = iter([0.0, 1.0, 11.0, 12.0, 25.0, 100.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    report = progress.told(lines.append, "certificate")
    for done in (100, 600, 700, 1100, 2100):
        report(done, 2100)
    assert lines == [
        "certificate: 600 of 2,100 samples, 33 s left",
        "certificate: 1,100 of 2,100 samples, 25 s left",
    ]
    clock = iter([0.0, 20.0])
    progress.told(lines.append, "certificate")(5, None)
    assert lines[-1] == "certificate: 5 samples"
