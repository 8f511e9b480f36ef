"""Results of --save that are there already: the same command finds its own, and computes nothing.

A result keeps the digest of what decided it: networks, points, data and options. Models of the
user's are left out, since their code may have changed in any of the files that it imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn.cli.output import version
from modeconn.errors import ModeconnError

if TYPE_CHECKING:
    import numpy as np

    from modeconn.data.datasets import Images
    from modeconn.evaluation.result import PathResult
    from modeconn.parameters import paths

# The entry of `PathResult.info` that has the digest.
KEY = "command"
OPTIONS = ("loss", "metrics", "buffers", "backend", "device", "batch_size", "precision")


def identity(
    args: argparse.Namespace,
    spec: str,
    path: paths.Path,
    points: int | str | np.ndarray,
    data: list[Images],
) -> str | None:
    """Returns the digest of all that decides the result of a command; None for a user's model.

    Args:
        args: the parsed options.
        spec: of the model.
        path: the path.
        points: where on it.
        data: the data sets that are read.
    """
    import torch

    from modeconn import models
    from modeconn.evaluation.resume import fingerprint
    from modeconn.files.fingerprints import digest_of_tensors

    if not models.is_builtin(spec):
        return None
    given: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS}
    adaptive = isinstance(points, str)
    given |= fingerprint(path, path.points(2 if adaptive else points))
    given |= {"spec": spec, "adaptive": adaptive, "versions": [version(), torch.__version__]}
    given["data"] = [
        digest_of_tensors(
            {"x": images.inputs, "y": images.targets, "mean": images.mean, "std": images.std}
        )
        for images in data
    ]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()


def known(file: str | None, digest: str | None) -> PathResult | None:
    """Returns the result in a file if it is one with this digest."""
    from modeconn.evaluation.result import PathResult

    if file is None or digest is None or not Path(file).is_file():
        return None
    try:
        result = PathResult.load(file)
    except ModeconnError:  # it will be replaced
        return None
    return result if result.info.get(KEY) == digest else None
