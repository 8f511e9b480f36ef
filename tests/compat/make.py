"""Writes the files that tests/test_compat.py opens: one folder for each released version.

python tests/compat/make.py        # before a release; the folder is committed with it

The folder of a version that is released is never written anew. Before that it is removed and made
again where a format changes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modeconn as mc
from modeconn import resuming
from modeconn.models import build
from modeconn.parameters import state
from modeconn.training.train import train

HERE = Path(__file__).parent
SPEC, POINTS = "mlp:4-6-3", 5
TRAINING = {"lr": 0.1, "epochs": 3, "batch_size": 8, "stop_at_zero_error": False}


def data() -> tuple[Tensor, Tensor]:
    """Inputs and classes that need no random numbers, which versions of PyTorch draw otherwise."""
    x = torch.arange(96, dtype=torch.float64).view(24, 4)
    return torch.sin(x).float(), torch.arange(24) % 3


def network(number: int) -> nn.Module:
    """A network with weights by formula."""
    model = build(SPEC)
    with torch.no_grad():
        for place, value in enumerate(model.parameters()):
            numbers = torch.arange(value.numel(), dtype=torch.float64)
            value.copy_(torch.cos(numbers * (number + 2) + place).view(value.shape).float() / 2)
    return model


def evaluated(**options: Any) -> mc.PathResult:
    """The evaluation of which a folder has the result, and the sums of a part."""
    line = mc.Line(network(0), network(1))
    return mc.evaluate(
        network(0),
        line,
        data(),
        POINTS,
        batch_size=8,
        backend="reference",
        progress=False,
        **options,
    )


def train_on(file: Path, **options: Any) -> None:
    """The training of which a folder has the state after one epoch."""
    train(network(0), data(), checkpoint=file, **TRAINING, **options)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def write(folder: Path) -> None:
    """Write one file of each kind, and what was in them."""
    folder.mkdir()
    resuming.SECONDS_BETWEEN_WRITES = 0.0
    result = evaluated()
    for name in ("result.npz", "result.json"):
        result.save(folder / name)
    state.save(network(0).state_dict(), folder / "net.safetensors", {"model": SPEC})
    connection = mc.connect(
        network(0), network(0), network(1), data(), subnetworks="readout", target=9.0, spec=SPEC
    )
    connection.save(folder / "connection")
    with contextlib.suppress(KeyboardInterrupt):
        train_on(folder / "trained.safetensors", log=_stop)
    _interrupted(folder / "sums.safetensors")
    content = {
        "torch": torch.__version__,
        "loss": result.loss.tolist(),
        "bound": connection.certificate.bound,
        "breakpoints": len(connection.path.control_points),
    }
    (folder / "content.json").write_text(json.dumps(content, indent=1) + "\n")


def _interrupted(file: Path) -> None:
    """The sums of an evaluation that ended in the second of three batches."""

    def batches() -> Any:
        x, y = data()
        yield x[:8], y[:8]
        raise KeyboardInterrupt

    line = mc.Line(network(0), network(1))
    with contextlib.suppress(KeyboardInterrupt):
        mc.evaluate(
            network(0),
            line,
            batches(),
            POINTS,
            batch_size=8,
            backend="reference",
            progress=False,
            resume=file,
        )
    if not file.exists():
        raise SystemExit(f"{file} was not written")


if __name__ == "__main__":
    place = HERE / mc.__version__
    if place.exists():
        sys.exit(f"{place} is there already: files of a version are written once")
    write(place)
    print(*sorted(path.relative_to(HERE) for path in place.rglob("*")), sep="\n")
