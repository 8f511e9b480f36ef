"""Landscaper itself, of PyPI, against the drop-in; `make peers` installs it apart."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from landscaper_cases import conv, cross_entropy, data, directions, mlp, over_batches
from modeconn.dropin.landscaper import MeanLoss, compute_loss_landscape, save_landscape

ABSENT = "landscaper is not installed: run `make peers`"
landscaper = pytest.importorskip("landscaper", reason=ABSENT)
compute = pytest.importorskip("landscaper.compute", reason=ABSENT)

KINDS = ["cross-entropy", "greatest logit", "mean loss"]
MODELS = {"mlp": (mlp, 6), "conv": (conv, 4)}


@pytest.mark.parametrize("dim, steps", [(1, 7), (2, 4), (2, 5), (3, 3)])
@pytest.mark.parametrize("fn", [cross_entropy, over_batches, MeanLoss()], ids=KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_values_but_for_the_noise_on_the_greatest(name, fn, dim, steps):
    make, width = MODELS[name]
    model = make()
    options = {"steps": steps, "distance": 0.5, "dim": dim, "device": "cpu"}
    theirs, their_axes = compute.compute_loss_landscape(
        copy.deepcopy(model), data(width), directions(model, dim), fn, **options
    )
    ours, axes = compute_loss_landscape(model, data(width), directions(model, dim), fn, **options)
    greatest = ours == ours.max()
    assert ours.shape == theirs.shape and len(axes) == len(their_axes)
    np.testing.assert_allclose(ours[~greatest], theirs[~greatest], rtol=1e-5)
    np.testing.assert_array_equal(np.stack(axes), np.stack(their_axes))


def test_complex_directions():
    model = mlp()
    options = {"steps": 5, "distance": 1.0, "dim": 1, "device": "cpu", "use_complex": True}
    arguments = data(6), directions(model, 1, complex_=True), cross_entropy
    theirs, _ = compute.compute_loss_landscape(copy.deepcopy(model), *arguments, **options)
    ours, _ = compute_loss_landscape(model, *arguments, **options)
    greatest = ours == ours.max()
    np.testing.assert_allclose(ours[~greatest], theirs[~greatest], rtol=1e-5)


def test_its_class_takes_ours_and_reads_our_file(tmp_path):
    model = mlp()
    loss, axes = compute_loss_landscape(
        model, data(6), directions(model, 2), cross_entropy, steps=5, distance=1.0, dim=2
    )
    made = landscaper.LossLandscape(loss, axes)
    save_landscape(tmp_path / "landscape.npz", loss, axes)
    read = landscaper.LossLandscape.load_from_npz(str(tmp_path / "landscape.npz"))
    np.testing.assert_array_equal(read.loss, made.loss)
    np.testing.assert_array_equal(read.coords, made.coords)
    assert read.dims == 2 and torch.isfinite(torch.from_numpy(read.loss)).all()
