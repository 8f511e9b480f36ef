"""Runs an experiment in a folder; finished parts are read from it, so a run can be interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from modeconn.experiments.tables import Tables
from modeconn.files import atomic_write, locked
from modeconn.parameters.paths import Line
from modeconn.resuming import claim
from modeconn.stability.dropout import dropout_stability
from modeconn.stability.subnetworks import subnetwork_stability
from modeconn.stability.table import StabilityTable
from modeconn.training.checkpoint import training_file
from modeconn.training.loop import Epoch
from modeconn.training.train import train

Log = Callable[[str], None]
File = str | os.PathLike[str]


def reproduce(
    name: str,
    out: File,
    root: Any = None,
    *,
    quick: bool = True,
    solutions: Sequence[File] = (),
    seed: int = 1,
    log: Log | None = None,
) -> dict[str, Any]:
    """Runs one of the experiments of Nguyen et al. 2021, section 5.

    Args:
        name: "mnist-fcn", "cifar10-fcn", "cifar10-vgg11", "widths", "widths-cifar10" or "path".
        out: a folder, new or of the same experiment: then finished parts are kept and the rest is
            done.
        root: the folder of the data set's files.
        quick: settings of minutes on two cores; otherwise the paper's.
        solutions: checkpoints of the trained networks, two for "path" and one elsewhere; trained
            where none is given.
        seed: of the training, the draws and the subnetworks.
        log: called with a line of text now and then.

    Returns:
        the content of ``result.json``: settings, a line per entry layer (and width), the
            figure's name.

    Raises:
        ModeconnError: an unknown experiment, a folder of another one, checkpoints that do not fit,
            missing data.
    """
    setting = settings(name, quick)
    _check_solutions(name, setting, solutions)
    folder = Path(out)
    described = {
        "experiment": name,
        "seed": seed,
        "solutions": [str(Path(file).resolve()) for file in solutions],
        "settings": json.loads(json.dumps(asdict(setting))),
    }
    run = _Run(root, seed, log or _silent)
    with locked(folder):
        claim(folder, "settings.json", "experiment", described)
        if isinstance(setting, Sweep):
            found = _sweep(run, setting, folder, name)
        elif isinstance(setting, Join):
            found = _join(run, setting, folder, solutions)
        else:
            found = _single(run, setting, folder, name, solutions)
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
    name: str, setting: Experiment | Sweep | Join, solutions: Sequence[File]
) -> None:
    expected = {Experiment: 1, Sweep: 0, Join: 2}[type(setting)]
    if solutions and len(solutions) != expected:
        raise ModeconnError(f"{len(solutions)} solutions given: {name} takes {expected or 'none'}")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    atomic_write(file, lambda stream: stream.write(text.encode()))


# -- the kinds of experiments ----------------------------------------------------------------------


def _single(
    run: _Run, setting: Experiment, folder: Path, name: str, solutions: Sequence[File]
) -> dict[str, Any]:
    """Compares subnetworks and dropout networks of one solution, entry layer by entry layer."""
    if solutions:
        checkpoint = Path(solutions[0])
    else:
        checkpoint = _solution(run, setting, folder / "solution.safetensors")
    tables = _layers(run, setting, folder, checkpoint)
    figures.save(folder / f"{name}.png", lambda: figures.layers(name, tables))
    return {"lines": _lines(tables), "figure": f"{name}.png"}


def _sweep(run: _Run, setting: Sweep, folder: Path, name: str) -> dict[str, Any]:
    """Compares them at several widths."""
    lines: list[dict[str, Any]] = []
    for width in setting.widths:
        run.say(f"width {width}")
        place = folder / f"width-{width}"
        place.mkdir(exist_ok=True)
        experiment = setting.at(width)
        checkpoint = _solution(run, experiment, place / "solution.safetensors")
        tables = _layers(run, experiment, place, checkpoint)
        lines += [{"width": width, **line} for line in _lines(tables)]
    figures.save(folder / f"{name}.png", lambda: figures.widths(name, lines))
    return {"lines": lines, "figure": f"{name}.png"}


def _join(run: _Run, setting: Join, folder: Path, solutions: Sequence[File]) -> dict[str, Any]:
    """Joins two solutions and draws the path beside the dropout networks' level."""
    base = setting.base
    ends = [Path(file) for file in solutions] or _two_solutions(run, base, folder)
    model = models.build(base.model)
    data, _ = run.data(base)
    dropout = _dropout(run, base, folder / "dropout-2", ends[0], 2)
    level = max(each.best.train_loss for each in dropout.summary())
    connection = _connection(run, setting, folder, ends)
    line = evaluate(model, Line(*ends), data, points=25)
    curve = connection.evaluate(model, data)
    figures.save(folder / "path.png", lambda: figures.path(connection, line, curve, level))
    certificate = connection.certificate
    outcome = {
        "bound": certificate.bound,
        "target": setting.target,
        "outcome": certificate.outcome.name.lower(),
        "straight_line": float(max(line.loss)),
        "dropout_level": level if math.isfinite(level) else None,
    }
    return {"lines": [outcome], "figure": "path.png"}


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


def _two_solutions(run: _Run, setting: Experiment, folder: Path) -> list[Path]:
    """Trains two networks from different seeds."""
    ends = []
    for i in (1, 2):
        file = folder / f"solution-{i}.safetensors"
        ends.append(_solution(run, setting, file, run.seed + i - 1))
    return ends


def _layers(run: _Run, setting: Experiment, folder: Path, checkpoint: Path) -> list[Tables]:
    """Makes both tables at every fraction."""
    found = []
    for fraction in setting.fractions:
        stem = folder / f"dropout-{fraction:g}"
        dropout = _dropout(run, setting, stem, checkpoint, fraction)
        subnetworks = _subnetworks(run, setting, folder, checkpoint, fraction, len(dropout.entries))
        for suffix in (".csv", ".json"):
            subnetworks.save(folder / f"subnetworks-{fraction:g}{suffix}")
        found.append(Tables(fraction, subnetworks, dropout))
    return found


def _subnetworks(
    run: _Run, setting: Experiment, folder: Path, checkpoint: Path, fraction: float, count: int
) -> StabilityTable:
    """Trains the subnetworks of so many entry layers; those of equal recipes in one call."""
    data, test = run.data(setting)
    model = models.build(setting.model)
    recipes = {entry: setting.recipes.get(entry, setting.recipe) for entry in range(count)}
    tables = []
    for recipe in dict.fromkeys(recipes.values()):
        table = subnetwork_stability(
            model,
            checkpoint,
            data,
            test,
            fraction=fraction,
            draws=setting.draws,
            method="trained",
            recipe=recipe,
            entries=[entry for entry, own in recipes.items() if own == recipe],
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
