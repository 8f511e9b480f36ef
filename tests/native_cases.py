"""Shared by the tests of the C++ engine: the engine alone, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

engine = pytest.importorskip("modeconn._native", reason="the C++ extension is not built")

# By its file: `import modeconn` would import torch, which takes seconds.
LOAD = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("modeconn._native", {engine.__file__!r})
e = importlib.util.module_from_spec(spec)
spec.loader.exec_module(e)
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in another process, with the engine as `e`."""
    return subprocess.run(
        [sys.executable, "-c", LOAD + code],
        check=False,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
