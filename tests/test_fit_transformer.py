"""A curve between two transformers of four layers on text, by the call that trains any other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn import models


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Characters of Python's own source, [256, 12]."""
    codes = torch.tensor(list(Path(json.decoder.__file__).read_bytes())) % 32
    return codes[: 256 * 12].view(256, 12)


def trained(text: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = models.build("gpt:vocab=32,context=12,width=16,layers=4,heads=2")
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(60):
        rows = text[step % 4 * 64 :][:64]
        adam.zero_grad()
        F.cross_entropy(net(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).backward()
        adam.step()
    return net.eval().requires_grad_(False)


def test_the_loss_on_text_falls_along_the_curve(text: Tensor):
    a, b = (trained(text, seed) for seed in range(2))
    data = text, text
    fit = mc.fit_curve(
        a, a, b, data, loss="next_token", steps=80, lr=1e-2, batch_size=64, points=11
    )
    assert fit.alignment.samples == len(text)
    for key, value in a.state_dict().items():
        assert torch.equal(fit.path.at(0.0)[key], value)
    assert mc.same_function(b, fit.path.at(1.0), data).same
    tied = fit.path.at(0.5)
    assert torch.equal(tied["lm_head.weight"], tied["transformer.wte.weight"])
    line = mc.evaluate(a, mc.Line(a, b), data, 11, loss="next_token", metrics=("loss",))
    ends = max(line.loss[0], line.loss[-1])
    assert fit.result.barrier("loss") < 0.5 * (line.loss.max() - ends)
