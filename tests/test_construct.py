"""The constructive path: rewrites and shifts change nothing, swings are convex, ends are exact."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor, nn

from modeconn.connection.construct import Breakpoint, breakpoints
from modeconn.connection.layer_chain import LayerChain
from modeconn.connection.positions import room
from modeconn.connection.subnetworks import Subnetwork, carry, initial, kept_units, outputs
from modeconn.errors import ModeconnError
from modeconn.models import build
from naive import clone, mlp


def conv_chain(seed: int, norm: bool = True, bias: bool = True) -> nn.Sequential:
    """Two convolutions with norms and poolings, flattened (block 4) into three linear layers."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=bias),
        *[nn.BatchNorm2d(6)] * norm,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 14),
        nn.ReLU(),
        nn.Linear(14, 14, bias=bias),
        nn.ReLU(),
        nn.Linear(14, 3),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
    return model.double().eval()


def subnetworks(
    chain: LayerChain, kept: list[Tensor], widths: list[list[int]], seed: int
) -> list[Subnetwork]:
    generator = torch.Generator().manual_seed(seed)
    subs = [
        initial(chain, entry, units, m, generator)
        for entry, (units, m) in enumerate(zip(kept, widths))
    ]
    for sub in subs:
        for bias in sub.biases:
            if bias is not None:
                bias.normal_(generator=generator)
    return [sub.to(torch.empty(0, dtype=torch.float64)) for sub in subs]


def halves(chain: LayerChain, seed: int = 0) -> tuple[list[Tensor], list[list[int]]]:
    """Random halves of the units kept everywhere, full-depth subnetworks in the other half."""
    generator = torch.Generator().manual_seed(seed)
    kept = [
        torch.arange(chain.widths[0]),
        *(kept_units(n, n // 2, generator) for n in chain.widths[1:-1]),
    ]
    return kept, [[n // 2 for n in chain.widths[entry + 1 : -1]] for entry in range(chain.length)]


def check(
    chain: LayerChain,
    model: nn.Module,
    a: dict,
    b: dict,
    steps: list[Breakpoint],
    x: Tensor,
    expected: dict[str, Tensor],
) -> None:
    """End points, constant segments, affine segments, and the function at every break point."""
    assert all(torch.equal(steps[0].state[key], a[key]) for key in a)
    assert all(torch.equal(steps[-1].state[key], b[key]) for key in b)

    def logits(state: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(model, state, (x,))

    for step in steps:
        if step.label in expected:
            torch.testing.assert_close(
                logits(step.state), expected[step.label], rtol=1e-9, atol=1e-9
            )
    for before, after in itertools.pairwise(steps):
        first, last = logits(before.state), logits(after.state)
        for t in (0.3, 0.77):
            state = {
                k: torch.lerp(v, after.state[k], t) if v.is_floating_point() else v
                for k, v in before.state.items()
            }
            target = torch.lerp(first, last, t) if after.kind == "swing" else first
            torch.testing.assert_close(
                logits(state), target, rtol=1e-9, atol=1e-9, msg=f"{after.kind} to {after.label}"
            )


def expected(
    chain: LayerChain,
    states: dict[str, dict[str, Tensor]],
    subs: dict[str, list[Subnetwork]],
    x: Tensor,
) -> dict[str, Tensor]:
    """What the network computes at the break points that end a swing."""
    return {
        f"S_{sub.entry} of {name}": outputs(
            chain, sub, chain.run(states[name], x, 0, sub.entry)
        )
        for name in states
        for sub in subs[name]
    }


@pytest.mark.parametrize(
    "kind", ["mlp", "conv", "conv-no-norm", "conv-no-bias", "vgg11", "vgg11_bn"]
)
@pytest.mark.parametrize("shared", [True, False])
def test_path_of_random_networks(kind: str, shared: bool) -> None:
    torch.manual_seed(0)
    if kind == "mlp":
        models = [mlp(6, 12, 13, 12, 4, seed=s).double() for s in (1, 2)]
        x = torch.randn(20, 6, dtype=torch.float64)
    elif kind.startswith("vgg"):
        models = [build(f"{kind}:width=4").double().eval() for _ in (1, 2)]
        x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    else:
        models = [conv_chain(s, norm=kind == "conv", bias=kind != "conv-no-bias") for s in (1, 2)]
        x = torch.randn(7, 2, 8, 8, dtype=torch.float64)
    a, b = map(clone, models)
    chain = LayerChain.of(models[0], x)
    kept, widths = halves(chain)
    subs = {"a": subnetworks(chain, kept, widths, 1), "b": subnetworks(chain, kept, widths, 2)}
    if shared:
        subs["b"][0] = subs["a"][0]
    steps = breakpoints(chain, a, subs["a"], b, subs["b"])
    L = chain.length
    if shared:
        assert len(steps) - 1 == 4 * L - 1
    assert {step.kind for step in steps[1:]} <= {"rewrite", "swing", "shift"}
    check(chain, models[0], a, b, steps, x, expected(chain, {"a": a, "b": b}, subs, x))


def test_general_join_moves_twins() -> None:
    """Kept sets of two sides that differ: the second S_0 stands where the first one does."""
    models = [mlp(6, 12, 13, 12, 4, seed=s).double() for s in (1, 2)]
    x = torch.randn(20, 6, dtype=torch.float64)
    a, b = map(clone, models)
    chain = LayerChain.of(models[0], x)
    subs = {}
    for name, seed in (("a", 3), ("b", 4)):
        subs[name] = subnetworks(chain, *halves(chain, seed), seed)
    steps = breakpoints(chain, a, subs["a"], b, subs["b"])
    assert [step.kind for step in steps].count("shift") == 1
    assert len(steps) - 1 == 4 * chain.length + 3
    check(chain, models[0], a, b, steps, x, expected(chain, {"a": a, "b": b}, subs, x))


@settings(max_examples=25, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.data())
def test_heads_of_any_depth(data: st.DataObject) -> None:
    """Heads carried by identity, uneven splits, and any widths that have room."""
    depth = data.draw(st.integers(1, 4), label="hidden layers")
    # Few architectures, since each is captured once; kept units and heads divide them anyhow.
    hidden_widths = data.draw(st.sampled_from([(17, 14, 20, 15), (14, 19, 16, 20)]))
    widths = [5, *hidden_widths[:depth], 3]
    models = [mlp(*widths, seed=s).double() for s in (1, 2)]
    x = torch.randn(9, 5, dtype=torch.float64)
    a, b = map(clone, models)
    chain = LayerChain.of(models[0], x)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    kept = [
        torch.arange(5),
        *(kept_units(n, data.draw(st.integers(6, n - 6)), generator) for n in widths[1:-1]),
    ]
    subs = {}
    for name in "ab":
        heads = []
        for entry in range(chain.length):
            hidden = data.draw(st.integers(0, chain.length - 1 - entry))
            m = [
                min(len(kept[p]), widths[p] - len(kept[p]))
                if i or not entry
                else widths[p] - len(kept[p])
                for i, p in enumerate(range(entry + 1, entry + 1 + hidden))
            ]
            heads.append(m)
        subs[name] = subnetworks(chain, kept, heads, data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        subs["b"][0] = subs["a"][0]
    steps = breakpoints(chain, a, subs["a"], b, subs["b"])
    check(chain, models[0], a, b, steps, x, expected(chain, {"a": a, "b": b}, subs, x))


def test_carried_head_is_the_head() -> None:
    model = mlp(6, 12, 12, 12, 4).double()
    chain = LayerChain.of(model, torch.randn(4, 6, dtype=torch.float64))
    (head,) = subnetworks(chain, [torch.arange(6)], [[5]], 0)
    h = torch.randn(30, 6, dtype=torch.float64)
    full = carry(chain, head)
    assert full.widths == (5, 8, 8)
    assert torch.equal(outputs(chain, full, h), outputs(chain, head, h))


def test_identity_needs_relu() -> None:
    model = mlp(6, 12, 12, 4, activation=nn.Tanh)
    chain = LayerChain.of(model, torch.randn(4, 6))
    head = initial(chain, 0, torch.arange(6), [5], torch.Generator().manual_seed(0))
    with pytest.raises(
        ModeconnError, match=r"entry layer 0 cannot be carried .* tanh, which carries no numbers"
    ):
        carry(chain, head)
    # A full-depth subnetwork of a tanh network needs no carrying: the path holds.
    test_model = model.double()
    x = torch.randn(8, 6, dtype=torch.float64)
    chain = LayerChain.of(test_model, x)
    kept, widths = halves(chain)
    subs = subnetworks(chain, kept, widths, 0)
    state = clone(test_model)
    steps = breakpoints(chain, state, subs, state, subs)
    check(chain, test_model, state, state, steps, x, expected(chain, {"a": state}, {"a": subs}, x))


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU,
        nn.GELU,
        lambda: nn.GELU(approximate="tanh"),
        nn.SiLU,
        nn.Softplus,
        nn.Hardswish,
        lambda: nn.LeakyReLU(0.2),
    ],
)
def test_logits_are_carried_through_activations(activation) -> None:
    layers = [nn.Linear(5, 20), activation(), nn.Linear(20, 20), activation()]
    model = nn.Sequential(*layers, nn.Linear(20, 18), activation(), nn.Linear(18, 3)).double()
    x = 5 * torch.randn(40, 5, dtype=torch.float64)
    chain = LayerChain.of(model, x[:4])
    for widths in ((), (7,), (7, 6)):
        sub = initial(chain, 0, torch.arange(5), widths, torch.Generator().manual_seed(1))
        sub = sub.to(x)
        full = carry(chain, sub)
        assert full.widths[len(widths) :] == (6,) * (3 - len(widths))
        # 1e-8: softplus is linear beyond 20 in PyTorch.
        torch.testing.assert_close(
            outputs(chain, full, x), outputs(chain, sub, x), rtol=1e-9, atol=1e-7
        )


def test_no_room_is_said_with_layer_and_number() -> None:
    chain = LayerChain.of(mlp(6, 10, 11, 4).double(), torch.randn(4, 6, dtype=torch.float64))
    kept = [torch.arange(6), torch.arange(7), torch.arange(5)]
    subs = subnetworks(chain, kept, [[5, 4], [6], []], 0)
    state = {key: torch.zeros(()) for key in ()}
    with pytest.raises(
        ModeconnError, match=r"layer 1 has 10 units, 2 short of m_\{0,1\} \+ \|I_1\| = 5 \+ 7"
    ):
        breakpoints(chain, state, subs, state, subs)
    assert room(chain, {0: 6, 1: 5, 2: 5}, {0: [5, 5], 1: [6], 2: []}) == []
    assert room(chain, {0: 6, 1: 5, 2: 5}, {0: [5, 6], 1: [6], 2: []}) == [
        "layer 2 has 11 units, 1 short of m_{0,2} + m_{1,2} = 6 + 6"
    ]
    with pytest.raises(ModeconnError, match="expected 0 to 2"):
        breakpoints(chain, state, subs[1:], state, subs)
    with pytest.raises(ModeconnError, match="keeps 3 of 6 inputs: expected all"):
        breakpoints(
            chain,
            state,
            subnetworks(chain, [torch.arange(3), *kept[1:]], [[5, 4], [6], []], 0),
            state,
            subs,
        )
