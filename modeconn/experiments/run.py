"""Run an experiment in a folder: what is finished there is read, what is not is done, so that a run can be interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
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
from modeconn.files import atomic_write
from modeconn.parameters.paths import Line
from modeconn.resuming import claim
from modeconn.stability.dropout import dropout_stability
from modeconn.stability.subnetworks import subnetwork_stability
from modeconn.stability.table import StabilityTable
from modeconn.training.checkpoint import training_file
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
    """Run one of the paper's experiments.

    Args:
        name: "mnist-fcn", "cifar10-fcn", "cifar10-vgg11", "widths", "widths-cifar10" or "path".
        out: a folder, new or of the same experiment: then what is finished is kept and the rest is
            done.
        root: the folder of the data set's files.
        quick: settings of minutes on two cores; otherwise the paper's.
        solutions: checkpoints of the trained networks, two for "path" and one elsewhere; trained
            where none is given.
        seed: of the training, the draws and the subnetworks.
        log: called with a line of text now and then.

    Returns:
        what is written as ``result.json``: settings, a line per entry layer (and width), the
            figure's name.

    Raises:
        ModeconnError: an unknown experiment, a folder of another one, checkpoints that do not fit,
            missing data.
    """
    setting = settings(name, quick)
    wanted = {Experiment: 1, Sweep: 0, Join: 2}[type(setting)]
    if solutions and len(solutions) != wanted:
        raise ModeconnError(f"{len(solutions)} solutions given: {name} takes {wanted or 'none'}")
    folder = Path(out)
    described = {
        "experiment": name,
        "seed": seed,
        "solutions": [str(Path(file).resolve()) for file in solutions],
        "settings": json.loads(json.dumps(asdict(setting))),
    }
    claim(folder, "settings.json", "experiment", described)
    say = log or (lambda line: None)
    if isinstance(setting, Sweep):
        result = _sweep(setting, folder, root, seed, say)
    elif isinstance(setting, Join):
        result = _join(setting, folder, root, solutions, seed, say)
    else:
        tables = _layers(setting, folder, root, solutions[0] if solutions else None, seed, say)
        figures.save(folder / f"{name}.png", lambda: figures.layers(name, tables))
        result = {"lines": [line for each in tables for line in each.lines()]}
    result = {
        **described,
        **result,
        "figure": f"{name}.png" if not isinstance(setting, Join) else "path.png",
    }
    if isinstance(setting, Sweep):
        figures.save(folder / f"{name}.png", lambda: figures.widths(name, result["lines"]))
    _write_json(folder / "result.json", result)
    return result


def _write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1)
    atomic_write(file, lambda stream: stream.write(text.encode()))


def _data(setting: Experiment, root: Any) -> tuple[datasets.Images, datasets.Images]:
    return (
        datasets.load(setting.data, root, "train", limit=setting.limit),
        datasets.load(setting.data, root, "test"),
    )


def _solution(setting: Experiment, file: Path, root: Any, seed: int, say: Log) -> Path:
    """A network trained as the settings say, once."""
    if file.exists():
        return file
    data, test = _data(setting, root)
    model = models.build(setting.model)
    models.initialise(model, torch.Generator().manual_seed(seed))
    how: SolutionSettings = setting.solution
    say(
        f"training {setting.model} on {len(data):,} samples of {setting.data}, at most {how.epochs} epochs"
    )
    report = train(
        model,
        data,
        test=test,
        **asdict(how),
        seed=seed,
        checkpoint=file,
        resume=training_file(file).exists(),
        metadata={"model": setting.model, "data": setting.data},
        log=lambda e: say(
            f"epoch {e.epoch} of {e.epochs}: loss {e.loss:.4g}, error {100 * e.error:.2f} %"
        ),
    )
    say(
        f"trained for {report.epochs} epochs: loss {report.loss:.4g}, error {100 * report.error:.2f} %"
    )
    return file


def _layers(
    setting: Experiment, folder: Path, root: Any, solution: File | None, seed: int, say: Log
) -> list[Tables]:
    """Both tables at every fraction."""
    checkpoint = (
        Path(solution)
        if solution
        else _solution(setting, folder / "solution.safetensors", root, seed, say)
    )
    data, test = _data(setting, root)
    model = models.build(setting.model)
    found = []
    for fraction in setting.fractions:
        dropout = _dropout(
            setting, folder / f"dropout-{fraction:g}", checkpoint, data, test, fraction, seed, say
        )
        entries = range(len(dropout.entries))
        # The entry layers of equal recipes in one call.
        recipes = {e: setting.recipes.get(e, setting.recipe) for e in entries}
        parts = [
            subnetwork_stability(
                model,
                checkpoint,
                data,
                test,
                fraction=fraction,
                draws=setting.draws,
                method="trained",
                recipe=recipe,
                entries=[e for e in entries if recipes[e] == recipe],
                seed=seed,
                folder=folder / "draws",
                log=say,
            )
            for recipe in dict.fromkeys(recipes.values())
        ]
        subnetworks = StabilityTable(
            [row for part in parts for row in part.rows], parts[0].original
        )
        for suffix in (".csv", ".json"):
            subnetworks.save(folder / f"subnetworks-{fraction:g}{suffix}")
        found.append(Tables(fraction, subnetworks, dropout))
    return found


def _dropout(
    setting: Experiment,
    stem: Path,
    checkpoint: Path,
    data: Any,
    test: Any,
    fraction: float,
    seed: int,
    say: Log,
) -> StabilityTable:
    file = stem.with_name(f"{stem.name}.json")
    if file.exists():
        return StabilityTable.load(file)
    say(f"dropout networks, {setting.dropout_draws} draws per entry layer")
    model = models.build(setting.model)
    table = dropout_stability(
        model, checkpoint, data, test, fraction=fraction, draws=setting.dropout_draws, seed=seed
    )
    table.save(stem.with_name(f"{stem.name}.csv"))
    table.save(file)
    return table


def _sweep(setting: Sweep, folder: Path, root: Any, seed: int, say: Log) -> dict[str, Any]:
    lines: list[dict[str, Any]] = []
    for width in setting.widths:
        say(f"width {width}")
        place = folder / f"width-{width}"
        place.mkdir(exist_ok=True)
        tables = _layers(setting.at(width), place, root, None, seed, say)
        lines += [{"width": width, **line} for each in tables for line in each.lines()]
    return {"lines": lines}


def _join(
    setting: Join, folder: Path, root: Any, solutions: Sequence[File], seed: int, say: Log
) -> dict[str, Any]:
    base = setting.base
    ends = [Path(file) for file in solutions] or [
        _solution(base, folder / f"solution-{i}.safetensors", root, seed + i - 1, say)
        for i in (1, 2)
    ]
    data, test = _data(base, root)
    model = models.build(base.model)
    dropout = _dropout(base, folder / "dropout-2", ends[0], data, test, 2, seed, say)
    level = max(each.best.train_loss for each in dropout.summary())
    place = folder / "connection"
    if place.exists():
        connection = Connection.load(place)
    else:
        connection = connect(
            model,
            ends[0],
            ends[1],
            data,
            setting.kept,
            setting.target,
            test,
            seed=seed,
            spec=base.model,
            folder=folder / "search",
            log=say,
        )
        connection.save(place)
    line = evaluate(model, Line(*ends), data, points=25)
    curve = connection.evaluate(model, data)
    figures.save(folder / "path.png", lambda: figures.path(connection, line, curve, level))
    bound = connection.certificate.bound
    return {
        "lines": [
            {
                "bound": bound,
                "target": setting.target,
                "outcome": connection.certificate.outcome.name.lower(),
                "straight_line": float(max(line.loss)),
                "dropout_level": level if math.isfinite(level) else None,
            }
        ]
    }
