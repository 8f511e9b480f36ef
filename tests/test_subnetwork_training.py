"""Subnetworks trained together are what each would be alone, and what a plain loop gives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeconn import ModeconnError
from modeconn.connection import stack
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.recipe import Recipe
from modeconn.connection.subnetworks import Subnetwork, initial, kept_units, outputs
from modeconn.connection.training import measure, train_subnetworks
from naive import mlp

RECIPE = Recipe(lr=5e-3, batch_size=32, epochs=3, schedule="onecycle")


def task(kind: str = "mlp", samples: int = 150) -> tuple[LayerChain, Tensor, Tensor]:
    """A chain, features of entry layer 1 and labels that depend on them."""
    torch.manual_seed(1)
    if kind == "mlp":
        chain, h = (
            LayerChain.of(mlp(6, 12, 12, 3), torch.randn(4, 6)),
            torch.randn(samples, 12).relu(),
        )
    else:
        layers = [
            nn.Conv2d(2, 6, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3))
        chain, h = (
            LayerChain.of(model, torch.randn(4, 2, 6, 6)),
            torch.randn(samples, 6, 6, 6).relu(),
        )
    return chain, h, (h.flatten(1)[:, :3]).argmax(1)


def starts(
    chain: LayerChain, count: int, seed: int = 0, kept: float = 0.5, hidden: int = 5
) -> list[Subnetwork]:
    generator = torch.Generator().manual_seed(seed)
    return [
        initial(chain, 1, kept_units(chain.widths[1], kept, generator), [hidden], generator)
        for _ in range(count)
    ]


def same(a: Subnetwork, b: Subnetwork, exact: bool = False) -> bool:
    pairs = [*zip(a.weights, b.weights), *zip(a.biases, b.biases)]
    check = torch.equal if exact else lambda x, y: torch.allclose(x, y, rtol=1e-3, atol=1e-5)
    return all(x is y is None or check(x, y) for x, y in pairs)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_together_as_alone_and_as_a_plain_loop(kind: str, optimizer: str) -> None:
    chain, h, y = task(kind)
    subs, recipe = starts(chain, 3), replace(RECIPE, optimizer=optimizer, weight_decay=0.01)
    together = train_subnetworks(chain, subs, [h] * 3, y, recipe, seed=4)
    for sub, trained in zip(subs, together):
        (alone,) = train_subnetworks(chain, [sub], [h], y, recipe, seed=4)
        assert same(alone.subnetwork, trained.subnetwork)
        assert trained.epochs == 3
        assert not trained.reached
        plain = plain_loop(chain, sub, h, y, recipe, 4)
        assert same(plain, trained.subnetwork)
        logits = outputs(chain, plain, h).double()
        assert trained.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-3)
        assert trained.error == pytest.approx(
            float((logits.argmax(1) != y).double().mean()), abs=0.02
        )
        assert measure(chain, trained.subnetwork, h, y) == pytest.approx(
            (trained.loss, trained.error), rel=1e-5
        )
        assert trained.loss < measure(chain, sub, h, y)[0]


def plain_loop(
    chain: LayerChain, sub: Subnetwork, h: Tensor, y: Tensor, recipe: Recipe, seed: int
) -> Subnetwork:
    """The same training, written down as anybody would."""
    import numpy as np

    weights = [w.clone().requires_grad_() for w in sub.weights]
    biases = [None if b is None else b.clone().requires_grad_() for b in sub.biases]
    parameters = [p for p in (*weights, *biases) if p is not None]
    if recipe.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            parameters,
            lr=1.0,
            momentum=recipe.momentum,
            nesterov=True,
            weight_decay=recipe.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(
            parameters, lr=1.0, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
        )
    done, steps = 0, recipe.epochs * math.ceil(len(y) / recipe.batch_size)
    for epoch in range(recipe.epochs):
        drawn = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]) >> 1
        for rows in torch.randperm(len(y), generator=torch.Generator().manual_seed(drawn)).split(
            recipe.batch_size
        ):
            optimizer.param_groups[0]["lr"] = recipe.rate(done, steps)
            loss = F.cross_entropy(
                outputs(chain, replace(sub, weights=tuple(weights), biases=tuple(biases)), h[rows]),
                y[rows],
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    return replace(
        sub,
        weights=tuple(w.detach() for w in weights),
        biases=tuple(None if b is None else b.detach() for b in biases),
    )


def test_different_features_of_equal_shape_and_kept_ones_alone() -> None:
    chain, h, y = task()
    other = h.flip(1).contiguous()
    subs = starts(chain, 2)
    both = train_subnetworks(chain, subs, [h, other], y, RECIPE)
    cut = train_subnetworks(chain, subs, [h[:, subs[0].kept], other[:, subs[1].kept]], y, RECIPE)
    assert all(same(a.subnetwork, b.subnetwork) for a, b in zip(both, cut))
    assert same(
        train_subnetworks(chain, subs[1:], [other], y, RECIPE)[0].subnetwork, both[1].subnetwork
    )


def test_a_finished_subnetwork_leaves_and_changes_no_other() -> None:
    chain, h, y = task()
    subs = starts(chain, 3)
    recipe = replace(RECIPE, epochs=12)
    losses = [t.loss for t in train_subnetworks(chain, subs, [h] * 3, y, recipe)]
    stop = sorted(losses)[0] * 1.3
    results = train_subnetworks(chain, subs, [h] * 3, y, replace(recipe, stop_loss=stop))
    assert any(t.reached and t.epochs < 12 for t in results)
    for sub, trained, free in zip(subs, results, losses):
        assert (
            trained.loss <= stop
            if trained.reached
            else trained.loss == pytest.approx(free, rel=1e-3)
        )
        (alone,) = train_subnetworks(chain, [sub], [h], y, replace(recipe, stop_loss=stop))
        assert (alone.epochs, alone.reached) == (trained.epochs, trained.reached)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_interrupted_and_resumed_is_bitwise_the_same(kind: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("modeconn.resuming.SECONDS_BETWEEN_WRITES", 0.0)
    chain, h, y = task(kind)
    subs = starts(chain, 3)
    recipe = replace(RECIPE, epochs=6, stop_loss=0.6 if kind == "mlp" else None)
    whole = train_subnetworks(chain, subs, [h] * 3, y, recipe)
    file = tmp_path / "training.safetensors"

    def stop(done: int, epochs: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_subnetworks(chain, subs, [h] * 3, y, recipe, checkpoint=file, progress=stop)
    with pytest.raises(ModeconnError, match=r"started with lr .*, not 1\.0"):
        train_subnetworks(chain, subs, [h] * 3, y, replace(recipe, lr=1.0), checkpoint=file)
    resumed = train_subnetworks(chain, subs, [h] * 3, y, recipe, checkpoint=file)
    assert not file.exists()
    for a, b in zip(whole, resumed):
        assert (a.loss, a.error, a.epochs, a.reached) == (b.loss, b.error, b.epochs, b.reached)
        assert same(a.subnetwork, b.subnetwork, exact=True)


def test_without_training_error_it_stops_and_another_s_end_changes_nothing() -> None:
    chain, h, y = task(samples=60)
    subs = starts(chain, 3, kept=0.75, hidden=32)
    recipe = Recipe(lr=2e-2, batch_size=20, epochs=60, schedule="constant", stop_error=0.0)
    results = train_subnetworks(chain, subs, [h] * 3, y, recipe)
    assert any(t.reached for t in results)
    assert len({t.epochs for t in results}) > 1
    for sub, trained in zip(subs, results):
        (alone,) = train_subnetworks(chain, [sub], [h], y, recipe)
        assert (alone.epochs, alone.reached, alone.error) == (
            trained.epochs,
            trained.reached,
            trained.error,
        )
        assert alone.loss == pytest.approx(trained.loss, rel=1e-2)
        assert trained.reached == (trained.error == 0.0)
        assert trained.reached == (trained.epochs < 60)


def test_one_subnetwork_and_features_too_large_to_gather_at_once(monkeypatch) -> None:
    chain, h, y = task()
    subs = starts(chain, 2)
    gathered = train_subnetworks(chain, subs, [h, h], y, RECIPE)
    monkeypatch.setattr(stack.KeptFeatures.__init__, "__defaults__", (0,))
    by_batch = train_subnetworks(chain, subs, [h, h], y, RECIPE)
    assert all(same(a.subnetwork, b.subnetwork) for a, b in zip(gathered, by_batch))
    with pytest.raises(ModeconnError, match="no subnetworks"):
        train_subnetworks(chain, [], [], y, RECIPE)


def test_learning_rates() -> None:
    def rates(schedule: str, epochs: int = 30) -> list[float]:
        recipe = Recipe(lr=1.0, schedule=schedule, epochs=epochs)
        return [recipe.rate(step, 2 * epochs) for step in range(2 * epochs)]

    assert rates("constant") == [1.0] * 60
    assert rates("step") == [1.0] * 40 + [0.5] * 20
    falling = Recipe(lr=1.0, schedule="step", epochs=4, every=1, decay=0.9)
    assert [falling.rate(i, 4) for i in range(4)] == pytest.approx([1, 0.9, 0.81, 0.729])
    assert rates("cosine")[0] == 1.0
    assert rates("cosine") == sorted(rates("cosine"), reverse=True)
    assert max(rates("onecycle")) == pytest.approx(1.0)
    assert rates("onecycle").index(max(rates("onecycle"))) == 12


def test_all_stop_as_soon_as_one_may() -> None:
    """As the paper's fully connected subnetworks do, past so many epochs."""
    chain, h, y = task()
    subs = starts(chain, 3)
    recipe = Recipe(lr=0.03, batch_size=32, epochs=60, schedule="constant", stop_error=0.3)
    alone = train_subnetworks(chain, subs, [h] * 3, y, recipe)
    first = min(one.epochs for one in alone)
    together = replace(recipe, stop_together=True)
    found = train_subnetworks(chain, subs, [h] * 3, y, together)
    assert [one.epochs for one in found] == [first] * 3
    assert any(one.reached for one in found)
    assert all(math.isfinite(one.loss) for one in found)
    later = train_subnetworks(chain, subs, [h] * 3, y, replace(together, min_epochs=first + 2))
    assert len({one.epochs for one in later}) == 1 and later[0].epochs > first + 2
    assert max(one.epochs for one in alone) > first


def test_a_diverging_subnetwork_leaves_with_the_weights_it_had() -> None:
    chain, h, y = task()
    subs = starts(chain, 2)
    infinite = replace(subs[0], weights=(subs[0].weights[0] * math.inf, subs[0].weights[1]))
    bad, good = train_subnetworks(chain, [infinite, subs[1]], [h, h], y, RECIPE)
    assert (bad.loss, bad.error, bad.reached) == (math.inf, 1.0, False)
    assert math.isfinite(good.loss)


def test_no_epochs_measures_the_start() -> None:
    chain, h, y = task()
    (sub,) = starts(chain, 1)
    (trained,) = train_subnetworks(chain, [sub], [h], y, replace(RECIPE, epochs=0))
    assert same(trained.subnetwork, sub, exact=True)
    assert (trained.loss, trained.error) == measure(chain, sub, h, y)


def test_bad_input_is_named() -> None:
    chain, h, y = task()
    subs = starts(chain, 1)
    with pytest.raises(ModeconnError, match="labels run from 0 to 7, but Sequential has 3 outputs"):
        train_subnetworks(chain, subs, [h], y.clone().index_fill_(0, torch.tensor([5]), 7), RECIPE)
    with pytest.raises(ModeconnError, match="no samples"):
        train_subnetworks(chain, subs, [h[:0]], y[:0], RECIPE)
    with pytest.raises(ModeconnError, match="schedule is 'linear'"):
        train_subnetworks(chain, subs, [h], y, replace(RECIPE, schedule="linear"))
    with pytest.raises(ModeconnError, match="expected as many features"):
        train_subnetworks(chain, subs, [h, h], y, RECIPE)
    with pytest.raises(ModeconnError, match="equal shapes"):
        train_subnetworks(
            chain,
            [*subs, initial(chain, 1, subs[0].kept, [4], torch.Generator())],
            [h, h],
            y,
            RECIPE,
        )
    with pytest.raises(ModeconnError, match="optimizer is 'adam'"):
        train_subnetworks(chain, subs, [h], y, replace(RECIPE, optimizer="adam"))
    with pytest.raises(ModeconnError, match="lr is -1"):
        train_subnetworks(chain, subs, [h], y, replace(RECIPE, lr=-1.0))
