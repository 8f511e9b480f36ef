"""Checkpoints that are kept by the real trainers of Lightning and of transformers.

`make peers` installs them apart; elsewhere the tests of what is missing are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import modeconn as mc

# Deprecations within the trainers are theirs.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("seeded")]

X = torch.randn(48, 7, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 4
DATA = TensorDataset(X, Y)


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4))


# -- Lightning -------------------------------------------------------------------------------------


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.seen: list[tuple[int, Tensor]] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            value = F.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", value)
            return value

        def on_train_batch_end(self, *rest: Any) -> None:
            self.seen.append((self.trainer.global_step, self.net[0].weight.detach().clone()))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Lit()


def fitted(module: Any, trajectory: mc.Trajectory, folder: Path, **options: Any) -> Any:
    import lightning.pytorch as lightning

    trainer = lightning.Trainer(
        max_epochs=2,
        callbacks=[trajectory.for_lightning()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, DataLoader(DATA, batch_size=8))
    return trainer


@pytest.mark.parametrize("accumulated", [1, 2])
def test_lightning_by_steps(tmp_path: Path, accumulated: int):
    module, trajectory = lightning_module(), mc.Trajectory(every=2)
    start = module.net[0].weight.detach().clone()
    fitted(module, trajectory, tmp_path, accumulate_grad_batches=accumulated)
    kept = [state["net.0.weight"] for state in trajectory.checkpoints]
    latest = dict(module.seen)  # the weights by the step of the optimizer
    steps = sorted(step for step in latest if step % 2 == 0 and step)
    assert len(kept) == 1 + len(steps) == 1 + 12 // accumulated // 2
    assert torch.equal(kept[0], start)
    for weight, step in zip(kept[1:], steps):
        assert torch.equal(weight, latest[step]), step


def test_lightning_by_epochs_and_the_module_as_a_model(tmp_path: Path):
    module, trajectory = lightning_module(), mc.Trajectory()
    start = {k: v.clone() for k, v in module.state_dict().items()}
    fitted(module, trajectory, tmp_path)
    assert len(trajectory.checkpoints) == 3
    plane = trajectory.plane()
    assert len(plane.marks) == 3
    assert module.trainer is not None  # a trained module holds its trainer, which is not copied
    path = mc.Line(start, module)
    result = mc.evaluate(module, path, DataLoader(DATA, batch_size=16), 5)
    plain = network()
    for t, value in zip(result.t, result.loss):
        plain.load_state_dict({k.removeprefix("net."): v for k, v in path.at(t).items()})
        with torch.no_grad():
            expected = F.cross_entropy(plain.eval()(X), Y).item()
        assert value == pytest.approx(expected, rel=1e-5)
    values = mc.map(lambda m: F.cross_entropy(m.eval()(X), Y).item(), module, path, 5, replay=True)
    np.testing.assert_allclose(list(values), result.loss, rtol=1e-5)
    assert values.info["answered"] == 3


# -- transformers ----------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Rows as the Trainer of transformers takes them."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": X[index], "labels": Y[index]}


class WithLoss(nn.Module):
    """Returns its loss, as the Trainer expects it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("every", [2, None], ids=["steps", "epochs"])
def test_transformers(tmp_path: Path, every: int | None):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, trajectory = WithLoss(), mc.Trajectory(every=every)
    start = model.net[0].weight.detach().clone()
    seen: dict[int, Tensor] = {}

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = kwargs["model"].net[0].weight.detach().clone()

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=0.05,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        callbacks=[trajectory.for_transformers(), Look()],
    ).train()
    kept = [state["net.0.weight"] for state in trajectory.checkpoints]
    steps = [2, 4, 6, 8, 10, 12] if every else [6, 12]
    assert len(kept) == 1 + len(steps) and torch.equal(kept[0], start)
    for weight, step in zip(kept[1:], steps):
        assert torch.equal(weight, seen[step]), step
    result = mc.evaluate(
        model,
        mc.Line(trajectory.checkpoints[0], trajectory.checkpoints[-1]),
        [{"x": X, "labels": Y}],
        3,
        loss=lambda output, labels: F.cross_entropy(output["logits"], labels, reduction="none"),
        metrics=("loss",),
    )
    with torch.no_grad():
        expected = F.cross_entropy(model.eval()(X)["logits"], Y).item()
    assert result.loss[-1] == pytest.approx(expected, rel=1e-5)
