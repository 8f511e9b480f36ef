"""Networks that most people have: one more point of a line, here and by the best plain loop.

`python bench/run.py --models` times those that are installed (torchvision, timm, transformers; the
others are named), in CPU time. Every contender takes its turn in each round. The plain loops are a
pass per point in the model's layout, in channels last, and by functional_call, each with the rows
at a time that are given; the best of them is the peer. Ours is timed at two counts of points: their
difference is the passes, and what is left of the shorter one is the fixed cost of a warm call.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from table import machine
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import modeconn as mc
from modeconn.models import build
from modeconn.parameters.paths import Path

# Points of the two evaluations whose difference is a pass per point.
_FEW, _MANY = 2, 6
Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        makers: by the package that each needs: the first that is installed is taken.
        size: of images, or tokens of a text where `vocabulary` is given.
    """

    name: str
    makers: dict[str, Make]
    samples: int
    size: int
    vocabulary: int = 0


def _vision(name: str) -> nn.Module:
    models = importlib.import_module("torchvision.models")
    made: nn.Module = models.get_model(name, weights=None)
    return made


def _timm(name: str) -> nn.Module:
    made: nn.Module = importlib.import_module("timm").create_model(name, pretrained=False)
    return made


def _transformer(config: str, model: str, **sizes: Any) -> nn.Module:
    transformers = importlib.import_module("transformers")
    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    return made


def _bert() -> nn.Module:
    sizes = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    return _transformer(
        "BertConfig", "BertForSequenceClassification", intermediate_size=2048, **sizes
    )


def _gpt2() -> nn.Module:
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128, "vocab_size": 2000}
    return _transformer("GPT2Config", "GPT2LMHeadModel", use_cache=False, **sizes)


def _resnet(depths: list[int], kind: str) -> nn.Module:
    basic = kind == "basic"
    widths = [64, 128, 256, 512] if basic else [256, 512, 1024, 2048]
    sizes = {"depths": depths, "hidden_sizes": widths, "layer_type": kind}
    return _transformer("ResNetConfig", "ResNetForImageClassification", **sizes)


def _makers(vision: str = "", timm: str = "", transformers: Make | None = None) -> dict[str, Make]:
    makers: dict[str, Make] = {}
    if vision:
        makers["torchvision"] = functools.partial(_vision, vision)
    if timm:
        makers["timm"] = functools.partial(_timm, timm)
    if transformers is not None:
        makers["transformers"] = transformers
    return makers


def _vit() -> nn.Module:
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    return _transformer("ViTConfig", "ViTForImageClassification", **sizes)


def _convnext() -> nn.Module:
    sizes = {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}
    return _transformer("ConvNextConfig", "ConvNextForImageClassification", **sizes)


def _swin() -> nn.Module:
    return _transformer("SwinConfig", "SwinForImageClassification")


def _mobilenet() -> nn.Module:
    return _transformer("MobileNetV2Config", "MobileNetV2ForImageClassification")


_R18 = _makers("resnet18", "resnet18", lambda: _resnet([2, 2, 2, 2], "basic"))
_R50 = _makers("resnet50", "resnet50", lambda: _resnet([3, 4, 6, 3], "bottleneck"))
MODELS = (
    Model("resnet18, 64 px", _R18, 64, 64),
    Model("bert_small, 64 tokens", _makers(transformers=_bert), 8, 64, 30_000),
    Model("resnet50, 64 px", _R50, 16, 64),
    Model("densenet121, 64 px", _makers("densenet121", "densenet121"), 16, 64),
    Model("mixer_s32", _makers(timm="mixer_s32_224"), 8, 224),
    Model("convnext_atto", _makers(timm="convnext_atto", transformers=_convnext), 16, 224),
    Model("vit_tiny", _makers(timm="vit_tiny_patch16_224", transformers=_vit), 8, 224),
    Model("mobilenetv3_small", _makers("mobilenet_v3_small"), 32, 224),
    Model("mobilenetv2", _makers("mobilenet_v2", transformers=_mobilenet), 32, 224),
    Model("GPT-2 4 × 128, 64 tokens", _makers(transformers=_gpt2), 16, 64, 2000),
    Model("swin_tiny", _makers("swin_t", transformers=_swin), 2, 224),
    Model("resnet18, 224 px", _R18, 8, 224),
    Model("vit of modeconn, 32 px", {"modeconn": lambda: build("vit")}, 64, 32),
)


@dataclass(frozen=True)
class _Work:
    """A line between two random networks, with its data."""

    model: nn.Module
    path: Path
    x: Tensor
    y: Tensor


def _work(model: Model) -> _Work | None:
    """The networks and data of a row; None where no package has it."""
    able = [make for name, make in model.makers.items() if importlib.util.find_spec(name)]
    if not able:
        return None
    torch.manual_seed(0)
    a, b = able[0]().eval(), able[0]().eval()
    if model.vocabulary:
        x = torch.randint(3, model.vocabulary, (model.samples, model.size))
    else:
        x = torch.randn(model.samples, 3, model.size, model.size)
    with torch.no_grad():
        logits = _logits(a(x[:1]))
    y = torch.randint(0, logits.shape[-1], (model.samples, *logits.shape[1:-1]))
    return _Work(a, mc.Line(a, b), x, y)


def _logits(output: Any) -> Tensor:
    found: Tensor = getattr(output, "logits", output)
    return found


def _loss(output: Any, y: Tensor) -> Tensor:
    logits = _logits(output)
    return F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")


def loop(work: _Work, rows: int, channels_last: bool, points: np.ndarray) -> float:
    """Loads each point's weights and runs the model."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = copy.deepcopy(work.model)
    x = work.x
    if x.dim() == 4:
        model, x = model.to(memory_format=layout), x.contiguous(memory_format=layout)  # type: ignore[call-overload]
    begun = time.process_time()
    with torch.no_grad():
        for t in points:
            model.load_state_dict(work.path.at(t))
            for inputs, labels in zip(x.split(rows), work.y.split(rows)):
                _loss(model(inputs), labels)
    return (time.process_time() - begun) / len(points)


def functional(work: _Work, rows: int, points: np.ndarray) -> float:
    """Swaps each point's weights into the model."""
    begun = time.process_time()
    with torch.no_grad():
        for t in points:
            state = work.path.at(t)
            for inputs, labels in zip(work.x.split(rows), work.y.split(rows)):
                _loss(functional_call(work.model, state, (inputs,)), labels)
    return (time.process_time() - begun) / len(points)


def ours(work: _Work, points: int) -> float:
    """Evaluates the line at some points, in all."""
    begun = time.process_time()
    mc.evaluate(work.model, work.path, (work.x, work.y), points, metrics=("loss",))
    return time.process_time() - begun


def _peers(work: _Work) -> Iterator[tuple[str, Callable[[], float]]]:
    points = np.linspace(0, 1, 3)
    for rows in {len(work.x), max(1, min(16, len(work.x)))}:
        yield f"loop {rows}", functools.partial(loop, work, rows, False, points)
        yield f"functional {rows}", functools.partial(functional, work, rows, points)
        if work.x.dim() == 4:
            yield f"channels_last {rows}", functools.partial(loop, work, rows, True, points)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Times every row that can be built, and prints the table."""
    print("| model, samples | best plain loop | ms a point | ours | ratio | fixed | first call |")
    print("|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        work = _work(model)
        if work is None:
            print(f"| {model.name} | needs {' or '.join(model.makers)} | | | | | |")
            continue
        rows.append(_timed(model, work, options.repeats))
        show(rows[-1])
    return {"machine": machine(), "models": rows}


def _timed(model: Model, work: _Work, repeats: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = ours(work, _FEW)
        peers = dict(_peers(work))
        times: dict[str, list[float]] = {name: [] for name in (*peers, "few", "many")}
        for _ in range(repeats):
            for name, peer in peers.items():
                times[name].append(peer())
            times["few"].append(ours(work, _FEW))
            times["many"].append(ours(work, _MANY))
    middle = {name: statistics.median(values) for name, values in times.items()}
    point = (middle["many"] - middle["few"]) / (_MANY - _FEW)
    best = min(peers, key=lambda name: middle[name])
    return {
        "model": f"{model.name}, {model.samples}",
        "best": best,
        "plain_s": middle[best],
        "point_s": point,
        "fixed_s": middle["few"] - _FEW * point,
        "first_s": first,
        "times": times,
    }


def show(row: dict[str, Any]) -> None:
    """Prints a row: a pass per point, ours, and their ratio; above 1 we win."""
    plain, point = row["plain_s"], max(row["point_s"], 1e-9)
    print(
        f"| {row['model']} | {row['best']} | {1e3 * plain:.1f} | {1e3 * point:.1f} | "
        f"{plain / point:.2f} | {row['fixed_s'] / plain:.1f} points | {row['first_s']:.1f} s |"
    )
