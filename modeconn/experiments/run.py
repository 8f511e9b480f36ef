"""Runs an experiment in a folder; finished parts are read from it, so a run can be interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from modeconn import models
from modeconn.connection.connection import Connection
from modeconn.connection.pipeline import connect
from modeconn.data import datasets
from modeconn.errors import ModeconnError
from modeconn.evaluation.evaluator import evaluate
from modeconn.experiments import figures
from modeconn.experiments.settings import Experiment, Join, Sweep, settings
from modeconn.experiments.settings import Solution as SolutionSettings
from modeconn.experiments.tables import Tables, dropout_level
from modeconn.files.writing import atomic_write, locked
from modeconn.parameters.paths import Line
from modeconn.resuming import claim
from modeconn.stability.dropout import dropout_stability
from modeconn.stability.subnetworks import subnetwork_stability
from modeconn.stability.table import Level, StabilityTable
from modeconn.training.checkpoint import training_file
from modeconn.training.loop import Epoch
from modeconn.training.train import train

Log = Callable[[str], None]
File = str | os.PathLike[str]
# Of a folder's content: 2 since dropout networks of layer l remove units of it, and solutions have
# folders of their own.
FORMAT = 2


def reproduce(
    name: str,
    out: File,
    root: Any = None,
    *,
    quick: bool = True,
    solutions: Sequence[File] | int | None = None,
    seed: int = 1,
    log: Log | None = None,
) -> dict[str, Any]:
    """Runs one of the experiments of Nguyen et al. 2021, section 5.

    Args:
        name: "mnist-fcn", "cifar10-fcn", "cifar10-vgg11", "widths", "widths-cifar10", "path" or
            "path-cifar10".
        out: a folder, new or of the same experiment: then finished parts are kept and the rest is
            done.
        root: the folder of the data set's files.
        quick: settings of minutes on two cores; otherwise the paper's.
        solutions: checkpoints of the trained networks (two for a path, none for widths), or how
            many are trained, from different seeds; as many as the settings say if None (the
            paper: 10 fully connected ones, 5 of VGG-11, 3 of each width). Results are means over
            them, with the 95 % interval of Student's t distribution.
        seed: of the training, the draws and the subnetworks; the second solution has the next one.
        log: called with a line of text now and then.

    Returns:
        the content of ``result.json``: settings, a line per entry layer (and width), the
            figure's name.

    Raises:
        ModeconnError: an unknown experiment, a folder of another one, checkpoints that do not fit,
            missing data.
    """
    setting = settings(name, quick)
    files = [] if solutions is None or isinstance(solutions, int) else list(solutions)
    count = solutions if isinstance(solutions, int) else len(files) or None
    _check_solutions(name, setting, files, count)
    if count is not None and not isinstance(setting, Join):
        setting = _with_solutions(setting, count)
    folder = Path(out)
    described = {
        "experiment": name,
        "format": FORMAT,
        "seed": seed,
        "solutions": [str(Path(file).resolve()) for file in files],
        "settings": json.loads(json.dumps(asdict(setting))),
    }
    run = _Run(root, seed, log or _silent)
    with locked(folder):
        claim(folder, "settings.json", "experiment", described)
        if isinstance(setting, Sweep):
            found = _sweep(run, setting, folder, name)
        elif isinstance(setting, Join):
            found = _join(run, setting, folder, name, files)
        else:
            found = _single(run, setting, folder, name, files)
        result = {**described, **found}
        _write_json(folder / "result.json", result)
    return result


@dataclass(frozen=True)
class _Run:
    """The data's folder, the seed and the log of an experiment."""

    root: Any
    seed: int
    say: Log

    def data(self, setting: Experiment) -> tuple[datasets.Images, datasets.Images]:
        """Loads training and test data."""
        data = datasets.load(setting.data, self.root, "train", limit=setting.limit)
        return data, datasets.load(setting.data, self.root, "test")


def _silent(line: str) -> None:
    """Ignores a line of the log."""


def _check_solutions(
    name: str, setting: Experiment | Sweep | Join, files: Sequence[File], count: int | None
) -> None:
    if count is not None and count < 1:
        raise ModeconnError(f"solutions is {count}: expected at least 1")
    if isinstance(setting, Join) and count not in (None, 2):
        raise ModeconnError(f"{count} solutions given: {name} takes 2")
    if isinstance(setting, Sweep) and files:
        raise ModeconnError(f"{count} solutions given: {name} trains its own, of every width")


def _with_solutions(setting: Experiment | Sweep, count: int) -> Experiment | Sweep:
    if isinstance(setting, Sweep):
        return replace(setting, base=replace(setting.base, solutions=count))
    return replace(setting, solutions=count)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    atomic_write(file, lambda stream: stream.write(text.encode()))


# -- the kinds of experiments ----------------------------------------------------------------------


def _single(
    run: _Run, setting: Experiment, folder: Path, name: str, files: Sequence[File]
) -> dict[str, Any]:
    """Compares subnetworks and dropout networks, entry layer by entry layer."""
    tables = _tables(run, setting, folder, files)
    title = _title(run, name, setting)
    figures.save(folder / f"{name}.png", lambda: figures.layers(title, tables))
    return {"lines": _lines(tables), "figure": f"{name}.png"}


def _sweep(run: _Run, setting: Sweep, folder: Path, name: str) -> dict[str, Any]:
    """Compares them at several widths."""
    lines: list[dict[str, Any]] = []
    by_width = {}
    for width in setting.widths:
        run.say(f"width {width}")
        place = folder / f"width-{width}"
        place.mkdir(exist_ok=True)
        (tables,) = _tables(run, setting.at(width), place, ())
        by_width[width] = tables
        lines += [{"width": width, **line} for line in tables.lines()]
    title = _title(run, name, setting.base, model="two hidden layers of each width")
    figures.save(folder / f"{name}.png", lambda: figures.widths(title, by_width))
    return {"lines": lines, "figure": f"{name}.png"}


def _join(
    run: _Run, setting: Join, folder: Path, name: str, files: Sequence[File]
) -> dict[str, Any]:
    """Joins two solutions and draws the path beside the dropout networks' level."""
    base = setting.base
    ends = [Path(file) for file in files] or [
        _solution(run, base, folder / f"solution-{i}.safetensors", run.seed + i - 1) for i in (1, 2)
    ]
    dropout = []
    for i, end in enumerate(ends, 1):
        dropout.append(_dropout(run, base, folder / f"dropout-2-{i}", end, 2))
    level = dropout_level(dropout)
    connection = _connection(run, setting, folder, ends)
    model = models.build(base.model)
    curves = {}
    for part, data in zip(("train", "test"), run.data(base)):
        line = evaluate(model, Line(*ends), data, points=25, distributed=False)
        curves[part] = connection.evaluate(model, data), line
    own = [table.original for table in dropout]
    title = _title(run, name, base, counts=f"{base.dropout_draws} draws (B), F = 2")
    figures.save(folder / f"{name}.png", lambda: figures.path(title, curves, level, own))
    certificate = connection.certificate
    outcome = {
        "bound": certificate.bound,
        "target": setting.target,
        "outcome": certificate.outcome.name.lower(),
        "straight_line": float(max(curves["train"][1].loss)),
        **_levels("dropout", level),
        "test_error": float(max(curves["test"][0].error)),
    }
    return {"lines": [outcome], "figure": f"{name}.png"}


def _levels(name: str, level: Level) -> dict[str, float]:
    return {f"{name}_loss": level.train_loss, f"{name}_test_error": level.test_error}


def _title(run: _Run, name: str, setting: Experiment, *, model: str = "", counts: str = "") -> str:
    """Names network, samples, draws, fractions and solutions for a figure."""
    samples = len(run.data(setting)[0])
    if not counts:
        fractions = " and ".join(f"{fraction:g}" for fraction in setting.fractions)
        counts = f"{setting.draws} (A) and {setting.dropout_draws} (B) draws, F = {fractions}"
        counts += f", {setting.solutions} solution" + "s" * (setting.solutions > 1)
    return f"{name}: {model or setting.model}\nN = {samples:,}, {counts}"


def _lines(tables: Sequence[Tables]) -> list[dict[str, Any]]:
    lines = []
    for each in tables:
        lines += each.lines()
    return lines


# -- their parts, each done once -------------------------------------------------------------------


def _solution(run: _Run, setting: Experiment, file: Path, seed: int | None = None) -> Path:
    """Trains a network as the settings say, unless the file is there.

    Args:
        seed: the run's if None.
    """
    if file.exists():
        # left by a kill between the two
        training_file(file).unlink(missing_ok=True)
        return file
    seed = run.seed if seed is None else seed
    data, test = run.data(setting)
    model = models.build(setting.model)
    models.initialise(model, torch.Generator().manual_seed(seed))
    how: SolutionSettings = setting.solution
    run.say(
        f"training {setting.model} on {len(data):,} samples of {setting.data}, "
        f"at most {how.epochs} epochs"
    )

    def show(e: Epoch) -> None:
        run.say(f"epoch {e.epoch} of {e.epochs}: loss {e.loss:.4g}, error {100 * e.error:.2f} %")

    report = train(
        model,
        data,
        test=test,
        **asdict(how),
        seed=seed,
        checkpoint=file,
        resume=training_file(file).exists(),
        metadata={"model": setting.model, "data": setting.data},
        log=show,
    )
    run.say(
        f"trained for {report.epochs} epochs: "
        f"loss {report.loss:.4g}, error {100 * report.error:.2f} %"
    )
    return file


def _tables(run: _Run, setting: Experiment, folder: Path, files: Sequence[File]) -> list[Tables]:
    """Makes both tables of every solution at every fraction."""
    found: dict[float, list[tuple[StabilityTable, StabilityTable]]] = {}
    for i in range(setting.solutions):
        place = folder / f"solution-{i + 1}"
        place.mkdir(exist_ok=True)
        own = replace(run, seed=run.seed + i)
        if setting.solutions > 1:
            run.say(f"solution {i + 1} of {setting.solutions}")
        if files:
            checkpoint = Path(files[i])
        else:
            checkpoint = _solution(own, setting, place / "solution.safetensors")
        for fraction in setting.fractions:
            pair = _pair(own, setting, place, checkpoint, fraction)
            found.setdefault(fraction, []).append(pair)
    return [Tables(fraction, *zip(*pairs, strict=True)) for fraction, pairs in found.items()]


def _pair(
    run: _Run, setting: Experiment, folder: Path, checkpoint: Path, fraction: float
) -> tuple[StabilityTable, StabilityTable]:
    """Makes the tables of subnetworks and of dropout networks of one solution."""
    stem = folder / f"dropout-{fraction:g}"
    dropout = _dropout(run, setting, stem, checkpoint, fraction)
    count = len(dropout.entries) + 1  # and entry layer 0
    subnetworks = _subnetworks(run, setting, folder, checkpoint, fraction, count)
    for suffix in (".csv", ".json"):
        subnetworks.save(folder / f"subnetworks-{fraction:g}{suffix}")
    return subnetworks, dropout


def _subnetworks(
    run: _Run, setting: Experiment, folder: Path, checkpoint: Path, fraction: float, count: int
) -> StabilityTable:
    """Trains the subnetworks of so many entry layers; those of equal settings in one call."""
    data, test = run.data(setting)
    model = models.build(setting.model)
    how = {
        entry: (setting.recipe_of(fraction, entry), setting.draws_of(entry))
        for entry in range(count)
    }
    tables = []
    for recipe, draws in dict.fromkeys(how.values()):
        table = subnetwork_stability(
            model,
            checkpoint,
            data,
            test,
            fraction=fraction,
            draws=draws,
            method="trained",
            recipe=recipe,
            entries=[entry for entry, own in how.items() if own == (recipe, draws)],
            seed=run.seed,
            folder=folder / "draws",
            log=run.say,
        )
        tables.append(table)
    whole = tables[0]
    for table in tables[1:]:
        whole = whole + table
    return whole


def _dropout(
    run: _Run, setting: Experiment, stem: Path, checkpoint: Path, fraction: float
) -> StabilityTable:
    """Evaluates the dropout networks, unless the table is there."""
    file = stem.with_name(f"{stem.name}.json")
    if file.exists():
        return StabilityTable.load(file)
    draws = setting.dropout_draws
    run.say(f"dropout networks, {draws} draws per entry layer")
    model, (data, test) = models.build(setting.model), run.data(setting)
    table = dropout_stability(
        model, checkpoint, data, test, fraction=fraction, draws=draws, seed=run.seed
    )
    table.save(stem.with_name(f"{stem.name}.csv"))
    table.save(file)
    return table


def _connection(run: _Run, setting: Join, folder: Path, ends: Sequence[Path]) -> Connection:
    """Connects two solutions, unless the connection is there."""
    place = folder / "connection"
    if place.exists():
        return Connection.load(place)
    base = setting.base
    data, test = run.data(base)
    connection = connect(
        models.build(base.model),
        ends[0],
        ends[1],
        data,
        setting.kept,
        setting.target,
        test,
        seed=run.seed,
        spec=base.model,
        folder=folder / "search",
        log=run.say,
    )
    connection.save(place)
    return connection
