"""The proof that samples are independent holds for common networks, never where they meet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fuzz.draw import Seeded
from fuzz.grammar import draw_case
from fuzz.layers import Apply, Network
from modeconn.capture.export import capture
from modeconn.capture.opaque import tensors_of
from modeconn.capture.rows import rows_are_independent
from plan_networks import CASES, networks

# Networks with a part that is called as it is, or an operation that is only known by its numbers.
UNPROVED = {"branches", "lstm"}


@pytest.mark.parametrize("name", CASES)
def test_common_networks_are_proved(name: str):
    inputs = CASES[name].inputs(torch.Generator().manual_seed(0))
    graph = capture(networks(CASES[name], 1)[0], inputs)
    assert rows_are_independent(graph) == (name not in UNPROVED)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "the batch's mean": lambda x: x - x.mean(0, keepdim=True),
    "the mean of all": lambda x: x - x.mean(),
    "its greatest": lambda x: x / (1 + x.abs().amax(0)),
    "a sum along the batch": lambda x: x.cumsum(0),
    "a softmax over the batch": lambda x: x.softmax(0),
    "its order": lambda x: x.sort(0).values,
    "the number of samples": lambda x: x / x.shape[0],
    "the place in the batch": lambda x: x * torch.arange(x.shape[0])[:, None],
    "the sample before": lambda x: x + x.roll(1, 0),
    "the samples turned round": lambda x: x.flip(0),
    "similarities": lambda x: (x @ x.t()).softmax(1) @ x,
    "a view across samples": lambda x: x.t().reshape(x.shape[0], -1),
    "all samples after the first": lambda x: torch.cat([x[:1], x[:1] + x[1:]]),
    "the mean of the batch as an offset": lambda x: x.t().mean(1) + x,
    "statistics of the batch": lambda x: F.batch_norm(x, None, None, training=True),
}


@pytest.mark.parametrize("name", MIXING)
def test_samples_that_meet_are_not_proved_apart(name: str):
    network = nn.Sequential(nn.Linear(4, 4), Apply(name, MIXING[name]))
    try:
        network(torch.randn(6, 4))
    except RuntimeError:
        pytest.skip("takes batches of some sizes only")
    graph = capture(network.eval(), torch.randn(6, 4))
    assert graph.fallback or not rows_are_independent(graph)


@pytest.mark.parametrize("seed", range(12))
def test_what_is_proved_holds(seed: int):
    """Where a drawn network is proved, a batch's outputs are those of its samples."""
    case = draw_case(Seeded(1000 + seed))
    network: Network = case.network.eval()  # type: ignore[assignment]
    graph = capture(network, case.inputs.clone())
    if graph.fallback or not rows_are_independent(graph):
        return
    with torch.no_grad():
        whole = tensors_of(network(case.inputs.clone()))[0]
        single = [tensors_of(network(case.inputs[i : i + 1].clone()))[0] for i in range(len(whole))]
    assert torch.allclose(torch.cat(single), whole, rtol=1e-4, atol=1e-5)
