"""The public names, pinned: a change here changes the contract and takes a line in CHANGELOG."""

from __future__ import annotations

import inspect

import pytest

import modeconn as mc


def test_public_names():
    assert sorted(mc.__all__) == [
        "Alignment",
        "Bezier",
        "Certificate",
        "Comparison",
        "ConditionsTable",
        "Connection",
        "DatasetMetric",
        "Ensemble",
        "FalseCertificate",
        "Fit",
        "Forward",
        "Groups",
        "LayerTable",
        "Line",
        "LossFunction",
        "MapResult",
        "Mixture",
        "ModeconnError",
        "PathResult",
        "Plan",
        "Plane",
        "PolyChain",
        "Predictions",
        "Sameness",
        "Separation",
        "Slerp",
        "StabilityTable",
        "Star",
        "States",
        "Subspace",
        "Trajectory",
        "align",
        "certify",
        "check",
        "conditions",
        "connect",
        "datasets",
        "dropout_stability",
        "ensemble",
        "evaluate",
        "explain",
        "fit_curve",
        "fit_line",
        "fit_simplex",
        "forward",
        "layerwise",
        "linear_separability",
        "load",
        "load_path",
        "lora",
        "loss_function",
        "map",
        "predict",
        "recomputed",
        "repair",
        "same_function",
        "search",
        "subnetwork_stability",
        "symmetries",
        "verify",
    ]
    assert all(hasattr(mc, name) for name in mc.__all__)
    assert sorted(mc._MODULE_OF) == sorted(mc.__all__)
    assert set(mc.__all__) <= set(dir(mc))
    with pytest.raises(AttributeError, match="module 'modeconn' has no attribute 'evalaute'"):
        mc.evalaute  # noqa: B018


def test_evaluate_signature():
    assert list(inspect.signature(mc.evaluate).parameters) == [
        "model",
        "path",
        "data",
        "points",
        "loss",
        "metrics",
        "buffers",
        "backend",
        "device",
        "batch_size",
        "progress",
        "precision",
        "memory_budget",
        "recompute_data",
        "recompute_batches",
        "recompute_average",
        "resume",
        "noise_seed",
        "tolerance",
        "floor",
        "ignore",
        "distributed",
    ]


def test_every_public_name_is_documented():
    for name in set(mc.__all__) - {"datasets"}:
        assert inspect.getdoc(getattr(mc, name)), name


def test_connect_signature():
    assert list(inspect.signature(mc.connect).parameters) == [
        "model",
        "a",
        "b",
        "train",
        "kept",
        "target",
        "test",
        "subnetworks",
        "seed",
        "loss",
        "spec",
        "folder",
        "log",
    ]
