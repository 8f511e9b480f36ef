"""The C++ extension: whether it loads, and the reasons where it does not."""

from __future__ import annotations

import importlib
import os
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import modeconn as mc
from modeconn.backends.activations import names_of
from modeconn.backends.native import extension as native
from modeconn.errors import ModeconnError
from modeconn.kernels.activations import ACTIVATIONS
from naive import mlp
from refused import refused

built = pytest.mark.skipif(not native.available(), reason=f"no C++ extension: {native.reason()}")


def test_the_extension_is_built_wherever_there_is_a_compiler():
    if os.environ.get("MODECONN_NATIVE") == "0":
        pytest.skip("MODECONN_NATIVE=0 asks for none")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler on the PATH")
    assert native.available(), native.reason()
    assert native.reason() == ""


@built
def test_the_activations_are_those_of_the_table():
    assert native.extension().activations() == names_of("native")


def test_the_activations_of_triton_are_those_of_the_table():
    assert list(ACTIVATIONS) == names_of("triton")


def test_an_extension_of_another_version_says_so(monkeypatch):
    other = SimpleNamespace(activations=lambda: ["identity", "tanh", "relu"])
    for module, built in ((other, "identity, tanh, relu"), (SimpleNamespace(), "unknown")):
        monkeypatch.setattr(importlib, "import_module", lambda name, module=module: module)
        native._load.cache_clear()
        try:
            assert not native.available()
            with pytest.raises(ModeconnError, match=f"another version, with activations {built}"):
                native.extension()
        finally:
            native._load.cache_clear()


@pytest.mark.parametrize(
    ("raised", "note", "message"),
    [
        (
            ModuleNotFoundError("x"),
            "no C++ compiler\n",
            "modeconn._native is not available: no C\\+\\+ compiler$",
        ),
        (
            ModuleNotFoundError("x"),
            None,
            "it has not been built for this Python; `pip install -e .`",
        ),
        (
            ImportError("undefined symbol: f"),
            None,
            "it was built but does not load: undefined symbol: f$",
        ),
    ],
    ids=["left out", "never built", "broken"],
)
def test_a_missing_extension_says_why(raised, note, message, monkeypatch, tmp_path):
    import_module = importlib.import_module

    def fail(name: str, *package: str) -> Any:
        if name == "modeconn._native":
            raise raised
        return import_module(name, *package)

    if note:
        (tmp_path / "note.txt").write_text(note)
    monkeypatch.setattr(native, "_MISSING_NOTE", tmp_path / "note.txt")
    monkeypatch.setattr(importlib, "import_module", fail)
    native._load.cache_clear()
    try:
        assert not native.available()
        with pytest.raises(ModeconnError, match=message):
            native.extension()
        a, b = mlp(6, 5, 4), mlp(6, 5, 4, seed=1)
        data = torch.ones(7, 6), torch.arange(7) % 4
        assert mc.evaluate(a, mc.Line(a, b), data, 3).backend == "reference"
        reason = message.replace("\\", "").removesuffix("$").rpartition(": ")[2]
        with refused('backend "native" cannot run this', reason):
            mc.evaluate(a, mc.Line(a, b), data, 3, backend="native")
    finally:
        native._load.cache_clear()


def test_poisoned_memory_shows_what_nobody_wrote(poisoned_memory: None):
    assert torch.isnan(torch.empty(5)).all()
    assert torch.isnan(torch.empty_like(torch.zeros(2, 3, dtype=torch.float64))).all()
    assert torch.isnan(torch.zeros(2).new_empty(7)).all()
