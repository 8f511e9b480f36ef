"""Plans of networks on three kinds of paths, and the engine's part of them, as written down.

They are what the planner's and the engine's rules give on small networks: a change of rules shows
here as a difference that can be read. `python tests/test_plans.py` writes them anew; with a file's
name it writes results there, bit for bit, to compare two versions on one machine.
"""

from __future__ import annotations

import difflib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import modeconn as mc
from modeconn.backends.native import extension as native
from modeconn.capture.export import capture
from modeconn.plan.planner import make_program
from plan_networks import CASES, networks, paths
from plan_text import Names, bits, lowered_text, plan_text

FOLDER = Path(__file__).parent / "plans"
POINTS = 5


def text_of(name: str) -> str:
    """The plans of one network on all paths."""
    case = CASES[name]
    made = networks(case)
    inputs = case.inputs(torch.Generator().manual_seed(0))
    lines: list[str] = []
    graph = capture(made[0], inputs)
    for kind, path in paths(made).items():
        points = path.points(POINTS)
        program = make_program(
            graph, path, points, dtype=torch.float32, device=torch.device("cpu"), frozen=frozenset()
        )
        names = Names()
        lines += [
            f"== {kind}",
            *plan_text(program, names),
            f"-- {kind}, engine",
            *lowered_text(program, names),
        ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_one_written_down(name):
    if not torch.__version__.startswith("2.13."):
        pytest.skip(
            "plans are written down for torch 2.13: what torch.export gives may differ in others"
        )
    expected = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    difference = difflib.unified_diff(
        expected.splitlines(), text_of(name).splitlines(), "written down", "now", lineterm="", n=1
    )
    assert not list(difference), "\n".join(difference)


def results_of(name: str) -> dict[str, list[str]]:
    """Losses, errors and outputs of one network on all paths by each backend, bit for bit."""
    case = CASES[name]
    made = networks(case)
    x = case.inputs(torch.Generator().manual_seed(0))
    found: dict[str, list[str]] = {}

    def loss(outputs: object, targets: torch.Tensor) -> torch.Tensor:
        return sum(each.reshape(len(targets), -1).sum(1) for each in outputs)  # type: ignore[union-attr]

    for kind, path in paths(made).items():
        for backend in (
            ("reference", "auto", "native") if native.available() else ("reference", "auto")
        ):
            for precision in ("float32", "float64"):
                key = f"{name} {kind} {backend} {precision}"
                try:
                    two = name == "mlp_two_outputs"
                    y = torch.arange(len(x)) % 5 if name != "gpt" else x
                    result = mc.evaluate(
                        made[0],
                        path,
                        (x, y),
                        POINTS,
                        backend=backend,
                        precision=precision,
                        progress=False,
                        **({"loss": loss, "metrics": ("loss",)} if two else {}),
                    )
                    found[key] = bits([result.loss, *([] if two else [result.error])])
                    if not two:
                        found[f"{key} outputs"] = bits(
                            [
                                mc.forward(
                                    made[0],
                                    path,
                                    np.linspace(0, 1, 3),
                                    x,
                                    backend=backend,
                                    precision=precision,
                                )
                            ]
                        )
                except mc.ModeconnError as error:
                    found.setdefault(key, [f"{type(error).__name__}: {error}"])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(
            json.dumps({k: v for name in CASES for k, v in results_of(name).items()}, indent=0)
        )
    else:
        FOLDER.mkdir(exist_ok=True)
        for name in CASES:
            (FOLDER / f"{name}.txt").write_text(text_of(name), encoding="utf-8")
