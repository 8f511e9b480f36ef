"""Every architecture that can be built small, against plain PyTorch in float64.

    python bench/sweep.py                                   a member of each kind
    python bench/sweep.py --all --json out.json             all that the installed packages list
    python bench/sweep.py --only GPT2                       those with a name
    python bench/sweep.py --write docs/models.md            the table into a document

Each is evaluated at three points of a line between two of random weights, twice: the first call
captures it, the second must not. What is told: whether the numbers are right, by the distance from
float64 that plain PyTorch in float32 has, the backend and its share of the arithmetic, why it or a
part of it runs as it is, and exports in either call.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from architectures import Case, cases
from table import machine
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.backends.base import attempt
from modeconn.backends.native.partition import subgraphs, whole_subgraph
from modeconn.capture.export import capture
from modeconn.data.inputs import Inputs, apply, call
from modeconn.errors import Unsupported
from modeconn.files.writing import atomic_write
from modeconn.plan.planner import make_program
from modeconn.plan.program import Program, Segment

POINTS = np.array([0.0, 0.5, 1.0])
# A loss may be as far from float64 as so many times plain float32 is, or this share of itself.
_TIMES, _RELATIVE = 4.0, 2e-6
_COMPARED = ("right", "wrong")
_HEADER = (
    "| package | architecture | numbers | error, plain float32's | backend | engine's share | "
    "nodes | exports | as it is, or why not |"
)
_BEGIN, _END = "<!-- sweep: begin -->", "<!-- sweep: end -->"


@dataclass
class Row:
    """What was found of an architecture.

    Attributes:
        verdict: "right", "wrong", "raised", "not built" or "not comparable": not finite, random.
        error, plain: largest distance of the losses from float64, relative, ours and PyTorch's.
        share: of the arithmetic at each point that the C++ engine does.
        exports: of the first call and of the second.
        seconds: CPU time of the first call and of the second.
    """

    family: str
    name: str
    verdict: str = ""
    note: str = ""
    error: float = 0.0
    plain: float = 0.0
    backend: str = ""
    share: float = 0.0
    nodes: int = 0
    exports: tuple[int, int] = (0, 0)
    seconds: tuple[float, float] = (0.0, 0.0)


def targets(case: Case, inputs: Inputs) -> Tensor:
    """Labels for a case's rows."""
    generator = torch.Generator().manual_seed(1)
    first = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    shape = tuple(first.shape) if case.kind == "tokens" else (len(first),)
    return torch.randint(0, case.classes, shape, generator=generator)


def plain_losses(
    ends: list[nn.Module], inputs: Inputs, y: Tensor, dtype: torch.dtype
) -> np.ndarray:
    """The losses by plain PyTorch: a network for each point, in some precision."""
    states = [end.state_dict() for end in ends]
    losses = []
    for t in POINTS:
        network = copy.deepcopy(ends[0]).to(dtype)
        network.load_state_dict(
            {name: _between(states[0][name], states[1][name], t, dtype) for name in states[0]}
        )
        x = apply(lambda v: v.to(dtype) if v.is_floating_point() else v.clone(), inputs)
        with torch.no_grad():
            logits = _logits(call(network.eval(), x))
        losses.append(F.cross_entropy(logits.flatten(0, -2), y.flatten()).item())
    return np.array(losses)


def _between(a: Tensor, b: Tensor, t: float, dtype: torch.dtype) -> Tensor:
    if not a.is_floating_point():
        return a
    ends = {0.0: a.to(dtype), 1.0: b.to(dtype)}
    mixed = ((1 - t) * a.double() + t * b.double()).to(dtype)
    return ends.get(float(t), mixed)


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    assert isinstance(found, Tensor)
    return found


@contextmanager
def counted_exports() -> Iterator[list[int]]:
    """Within, the calls of torch.export.export are counted."""
    from torch import export

    original, count = export.export, [0]

    @functools.wraps(original)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(*args, **kwargs)

    export.export = counted
    try:
        yield count
    finally:
        export.export = original


def tried(case: Case) -> Row:
    """Evaluates a case and compares it."""
    row = Row(case.family, case.name)
    torch.manual_seed(1)
    try:
        ends = [case.make().eval(), case.make().eval()]
        inputs = case.inputs()
        y = targets(case, inputs)
        right, plain = (plain_losses(ends, inputs, y, d) for d in (torch.float64, torch.float32))
    except Exception as error:  # the package's own business
        row.verdict, row.note = "not built", _line(error)
        return row
    try:
        with warnings.catch_warnings(), counted_exports() as count:
            warnings.simplefilter("ignore")
            results = [_evaluated(ends, inputs, y, count) for _ in range(2)]
            row.share, row.nodes = _share(ends, inputs)
    except Exception as error:
        row.verdict, row.note = "raised", _line(error)
        return row
    result = results[0][0]
    row.exports = (results[0][1], results[1][1])
    row.seconds = (results[0][2], results[1][2])
    row.backend, row.note = result.backend, str(result.info["fallback"])
    row.verdict = _verdict(row, right, plain, [found[0].loss for found in results])
    return row


def _evaluated(
    ends: list[nn.Module], inputs: Inputs, y: Tensor, count: list[int]
) -> tuple[mc.PathResult, int, float]:
    before, begun = count[0], time.process_time()
    data = [(inputs, y)]
    result = mc.evaluate(ends[0], mc.Line(*ends), data, POINTS, metrics=("loss",))
    return result, count[0] - before, time.process_time() - begun


def _verdict(row: Row, right: np.ndarray, plain: np.ndarray, ours: list[np.ndarray]) -> str:
    if not np.isfinite(right).all() or not np.isfinite(plain).all():
        return "not comparable"
    scale = np.abs(right).max()
    row.plain = float(np.abs(plain - right).max() / scale)
    row.error = float(max(np.abs(loss - right).max() for loss in ours) / scale)
    if row.plain > 1e-2:  # it draws random numbers, or its float32 says nothing
        return "not comparable"
    return "right" if row.error <= max(_TIMES * row.plain, _RELATIVE) else "wrong"


def _share(ends: list[nn.Module], inputs: Inputs) -> tuple[float, int]:
    """The engine's share of the arithmetic at each point, and the graph's nodes."""
    graph = capture(ends[0], inputs).only_logits().before_log_softmax()
    where = {"dtype": torch.float32, "device": torch.device("cpu"), "frozen": frozenset[str]()}
    program = make_program(graph, mc.Line(*ends), POINTS, **where)  # type: ignore[arg-type]
    total = sum(segment.flops for segment in program.segments)
    inside = sum(_inside(program, segment) for segment in program.segments)
    return inside / total if total else 1.0, len(graph.nodes)


def _inside(program: Program, segment: Segment) -> float:
    whole = attempt(functools.partial(whole_subgraph, program, segment))
    if not isinstance(whole, Unsupported):
        return segment.flops
    taken = [each for each in subgraphs(program, segment) if each.pays(segment)]
    steps = segment.steps
    return sum(sum(step.flops for step in steps[each.first : each.last + 1]) for each in taken)


def _line(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:140]}"


def table(rows: list[Row], missing: list[str]) -> str:
    """The rows as a table in Markdown, with what they add up to."""
    facts = machine()
    absent = f"; not installed: {', '.join(missing)}" if missing else ""
    text = [
        _counts(rows),
        f"PyTorch {facts['torch']}, {facts['isa']}, {facts['threads']} threads{absent}.",
        "",
        _HEADER,
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = f"{row.error:.0e}, {row.plain:.0e}" if row.verdict in _COMPARED else ""
        share = f"{row.share:.2f}" if row.backend else ""
        note = row.note.replace("|", "\\|")
        cells = [row.family, row.name, row.verdict, errors, row.backend, share, row.nodes or ""]
        exports = f"{row.exports[0]}, {row.exports[1]}"
        text.append("| " + " | ".join(map(str, [*cells, exports, note[:160]])) + " |")
    return "\n".join(text) + "\n"


def _counts(rows: list[Row]) -> str:
    """What the rows add up to, in a sentence."""
    kinds = Counter(row.verdict for row in rows)
    compared = [row for row in rows if row.verdict in _COMPARED]
    whole = sum(row.share >= 0.9 for row in compared)
    fallen = sum(bool(row.note) for row in compared)
    again = sum(row.exports[1] for row in rows)
    return (
        f"{len(rows)} architectures: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}; "
        f"{whole} of those compared have 90 % of their arithmetic in the C++ engine, {fallen} run "
        f"wholly or in part as they are; {again} exports in second calls."
    )


def write(file: Path, text: str) -> None:
    """Puts the table between its marks in a document."""
    before, _, rest = file.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    content = f"{before}{_BEGIN}\n{text}{_END}{after}".encode()
    atomic_write(file, lambda stream: stream.write(content))


def main() -> None:
    """Tries the cases that the options name, within their time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all that the packages list")
    parser.add_argument("--only", default="", help="those with this in their name")
    parser.add_argument("--minutes", type=float, default=10.0, help="begin none after so long")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--write", type=Path, help="document with the marks for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen, missing = cases(options.all, options.only)
    rows: list[Row] = []
    begun = time.monotonic()
    for case in chosen:
        if time.monotonic() - begun > 60 * options.minutes:
            print(f"after {options.minutes:g} minutes: {len(chosen) - len(rows)} were not tried")
            break
        rows.append(tried(case))
        print(*asdict(rows[-1]).values(), flush=True)
    text = table(rows, missing)
    print(text)
    if options.json:
        content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        encoded = json.dumps(content, indent=1).encode()
        atomic_write(options.json, lambda stream: stream.write(encoded))
    if options.write:
        write(options.write, text)
    if any(row.verdict in ("wrong", "raised") or row.exports[1] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
