"""Capture: many ways of writing a network give one graph; what cannot be captured still runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modeconn as mc
from modeconn.capture.export import capture, prepare, run

pytestmark = pytest.mark.usefixtures("fresh_graphs")


class Functional(nn.Module):
    """Functions, methods, views, buffers, a residual sum, a concatenation, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.batch_norm = nn.BatchNorm2d(6)
        self.layer_norm = nn.LayerNorm(6)
        self.head = nn.Linear(12, 5)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        x = x + F.relu_(self.batch_norm(x))
        x = F.adaptive_avg_pool2d(x, 1)
        x = x.view(x.size(0), -1) * self.scale
        x = torch.cat([self.layer_norm(x), 2 * x], dim=1)
        return self.head(F.dropout(x, 0.5, self.training))


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1)


class MixesRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0))


def ops(model: nn.Module, x: Tensor) -> list[str]:
    return [node.op for node in capture(model, x).nodes]


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_a_graph_takes_any_number_of_rows(rows):
    model = Functional().eval()
    graph = capture(model, torch.randn(4, 2, 8, 8))
    assert graph.fallback is None and not graph.mixes_rows
    x = torch.randn(rows, 2, 8, 8)
    torch.testing.assert_close(run(graph, model.state_dict(), x), model(x))


def test_operations_keep_their_names():
    model = nn.Sequential(
        nn.Conv1d(2, 3, 3),
        nn.BatchNorm1d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(9, 2),
    )
    got = ops(model, torch.randn(3, 2, 8))
    # max_pool1d has no high-level form of its own in every version of PyTorch
    assert [
        op for op in got if op in ("input", "conv1d", "batch_norm", "relu", "flatten", "linear")
    ] == [
        "input",
        "conv1d",
        "batch_norm",
        "relu",
        "flatten",
        "linear",
    ]
    assert {
        "conv2d",
        "group_norm",
        "batch_norm",
        "relu",
        "add",
        "layer_norm",
        "cat",
        "mul",
        "linear",
    } <= set(ops(Functional(), torch.randn(2, 2, 8, 8)))


def test_a_sample_of_one_row_will_do():
    assert capture(nn.Linear(4, 3), torch.randn(1, 4)).fallback is None


@pytest.mark.parametrize(
    "model, x", [(DataDependent(), torch.randn(6, 4)), (FixedBatch(), torch.randn(4, 6))]
)
def test_what_cannot_be_captured_falls_back_and_says_why(model, x, capfd):
    graph = capture(model, x)
    words = "torch.export" if isinstance(model, DataDependent) else "batches of 4 rows alone"
    assert graph.fallback is not None and words in graph.fallback
    assert capfd.readouterr() == ("", ""), "export's own noise stays out of the terminal"
    torch.testing.assert_close(run(graph, model.state_dict(), x), model(x))
    assert graph.takes == (0 if isinstance(model, DataDependent) else 4)
    assert not (graph.takes and graph.mixes_rows)


def test_rows_that_depend_on_each_other_are_noticed():
    assert capture(MixesRows(), torch.randn(4, 4)).mixes_rows
    assert not capture(nn.Linear(4, 3), torch.randn(4, 4)).mixes_rows


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    model[1].eval()  # a mode of its own
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    capture(model, torch.randn(3, 1, 5, 5))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_that_does_not_run_is_one_clear_line():
    with pytest.raises(mc.ModeconnError, match=r"does not run on inputs of shape \['N', 5\]"):
        capture(nn.Linear(4, 3), torch.randn(2, 5))


def test_several_outputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.layer(x)
            return {"logits": y, "pair": (x, y.exp())}

    model = Two()
    graph = capture(model, torch.randn(2, 4))
    x = torch.randn(5, 4)
    out = run(graph, model.state_dict(), x)
    assert graph.tensor_output is None and set(out) == {"logits", "pair"}
    torch.testing.assert_close(out["pair"][1], model(x)["pair"][1])


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self, depends: bool) -> None:
            super().__init__()
            self.inner, self.outer, self.depends = nn.Linear(4, 4), nn.Linear(4, 4), depends
            self.outer.weight = self.inner.weight

        def forward(self, x: Tensor) -> Tensor:
            y = self.outer(self.inner(x))
            return -y if self.depends and x.sum() > 1e9 else y

    for depends in (False, True):
        model = Tied(depends)
        x = torch.randn(3, 4)
        graph = capture(model, x)
        assert (graph.fallback is not None) == depends
        untied = {key: value.clone() for key, value in model.state_dict().items()}
        torch.testing.assert_close(run(graph, untied, x), model(x))


def test_a_graph_is_taken_up_again_only_while_it_holds():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(5, 4)
    first = capture(model, x)
    nn.init.ones_(model[0].weight)  # other weights, the same network
    assert capture(model, x) is first
    assert capture(model, torch.randn(5, 2, 4)) is not first
    model[1] = nn.Tanh()
    second = capture(model, x)
    assert second is not first and [node.op for node in second.nodes] == ["input", "linear", "tanh"]
    model[0].register_buffer("unused", torch.zeros(2))
    torch.testing.assert_close(run(capture(model, x), model.state_dict(), x), model(x))


def test_copies_in_another_precision_share_a_graph():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    x, cpu = torch.randn(5, 4), torch.device("cpu")
    single = capture(prepare(model, torch.float32, cpu), x)
    double = capture(prepare(model, torch.float64, cpu), x.double())
    assert double is not single
    model.train()  # networks are captured in eval mode
    assert capture(prepare(model, torch.float64, cpu), x.double()) is double
    assert capture(prepare(model, torch.float32, cpu), x) is single


def test_a_graph_with_closed_parts_holds_until_the_part_changes():
    model = nn.Sequential(nn.Linear(4, 4), DataDependent())
    x, cpu = torch.randn(6, 4).double(), torch.device("cpu")
    graphs = [capture(prepare(model, torch.float64, cpu), x) for _ in range(2)]
    assert graphs[0].closed and graphs[0] is graphs[1]
    model[1].layer = nn.Linear(4, 3, bias=False)
    assert capture(prepare(model, torch.float64, cpu), x) is not graphs[0]


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_settings_that_the_sample_does_not_show_are_noticed(precision):
    model = nn.Sequential(nn.Linear(4, 3), nn.Hardtanh(-9.0, 9.0))
    x = torch.rand(5, 4, dtype=precision) / 10
    first = capture(prepare(model, precision, torch.device("cpu")), x)
    model[1].max_val = 5.0
    second = capture(prepare(model, precision, torch.device("cpu")), x)
    assert [graph.nodes[-1]["max_val"] for graph in (first, second)] == [9.0, 5.0]


def test_hooks_added_later_are_noticed():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    x = torch.randn(5, 4)
    first = capture(model, x)
    model[1].register_forward_hook(lambda module, args, output: output.clamp(max=1e9))
    assert capture(model, x) is not first
