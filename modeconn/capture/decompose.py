"""Decomposition of exported programs, where it changes anything.

`run_decompositions` traces the program anew and takes longer than the export itself. What it is
for, functional operations that the rules know, most networks have as they are exported.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

from modeconn.capture.signature import named

# Operations that it leaves as they are: functional, and either not composite or kept whole by
# PyTorch. tests/test_decompose.py compares both forms.
_KEPT = frozenset(
    "adaptive_avg_pool1d.default adaptive_avg_pool2d.default add.Scalar add.Tensor addmm.default "
    "amax.default arange.default arange.start avg_pool1d.default avg_pool2d.default bmm.default "
    "cat.default clamp.default clamp_min.default conv1d.default conv2d.default "
    "conv_transpose2d.input cos.default cumsum.default div.Tensor elu.default embedding.default "
    "eq.Tensor exp.default expand.default gather.default ge.Scalar gelu.default group_norm.default "
    "hardsigmoid.default hardswish.default hardtanh.default index.Tensor layer_norm.default "
    "le.Tensor leaky_relu.default linear.default log.default log_sigmoid.default log_softmax.int "
    "matmul.default max_pool1d.default max_pool2d.default mean.dim mish.default mm.default "
    "mul.Scalar mul.Tensor ne.Scalar neg.default new_ones.default pad.default permute.default "
    "pow.Tensor_Scalar prelu.default reciprocal.default relu.default relu6.default repeat.default "
    "rsqrt.default rsub.Scalar scaled_dot_product_attention.default select.int selu.default "
    "sigmoid.default silu.default sin.default slice.Tensor softmax.int softplus.default "
    "split.Tensor sqrt.default squeeze.dim squeeze.dims sub.Scalar sub.Tensor sum.dim_IntList "
    "sym_size.int t.default tanh.default transpose.int unsqueeze.default view.default "
    "where.self zeros.default".split()
)
# Composite ones whose parts the normal form (capture/normalize.py) would put together again.
_WHOLE = frozenset(("flatten.using_ints", "reshape.default"))


def decomposed(program: Any) -> Any:
    """The functional form of an exported program, which is itself where it has it already."""
    program.graph.eliminate_dead_code()
    calls = [fx for fx in program.graph.nodes if fx.op == "call_function"]
    if program.graph_signature.buffers_to_mutate or not all(map(_is_kept, calls)):
        return program.run_decompositions({})
    return program


def _is_kept(fx: Any) -> bool:
    if fx.target is getitem:
        return True
    namespace, _, name = str(fx.target).partition(".")
    if namespace == "modeconn":  # a part that runs as it is (capture/stubs.py)
        return True
    if namespace != "aten":
        return False
    if name == "batch_norm.default":
        return not named(fx.target, fx.args, fx.kwargs)["training"]
    if name == "dropout.default":
        return not named(fx.target, fx.args, fx.kwargs)["train"]
    return name in _KEPT or name in _WHOLE
