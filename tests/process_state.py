"""What belongs to the process, and so to everybody in it."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch


def of_process() -> dict[str, object]:
    """Streams, random states, modes, settings and signals, by name."""
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": str(np.random.get_state()),  # noqa: NPY002
        "random's state": random.getstate(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "warning filters": [*warnings.filters],
        "how warnings are shown": warnings.showwarning,
        "streams": (sys.stdout, sys.stderr),
        "numpy's errors": np.geterr(),
        "numpy's printing": str(np.get_printoptions()),
        "matplotlib's settings": dict(mpl.rcParams),
        "log levels": (logging.root.level, logging.root.handlers[:], logging.root.disabled),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "import path": sys.path[:],
        "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)],
        "umask": _umask(),
    }


def _umask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask
