"""What the ops cost by PyTorch's counter, under Triton's interpreter."""

import math
import subprocess
import sys

import pytest
import torch
from kernel_cases import FUNCTIONS, GROUPED, make_inputs
from torch.utils.flop_counter import FlopCounterMode

from hf_blr import ops

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the kernels under Triton's interpreter")

#: tokens, B1, B2, P, Q, R
SIZE = (40, 2, 3, 12, 8, 4)


def counted(function) -> int:
    with FlopCounterMode(display=False) as mode:
        function()
    return mode.get_total_flops()


def expected_forward(tensors) -> int:
    x, *factors = tensors
    return 2 * len(x) * sum(math.prod(f.shape) for f in factors if f.dim() > 1)


@pytest.mark.parametrize("structure", FUNCTIONS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_each_number_of_the_factors_meets_each_token(structure, tokens):
    tensors = make_inputs(structure, tokens, *SIZE[1:], torch.float32)
    with torch.no_grad():
        assert counted(lambda: FUNCTIONS[structure][0](*tensors, impl="triton")) == expected_forward(tensors)


@pytest.mark.parametrize("structure", ["low_rank", "monarch"])
def test_as_much_as_plain_products(structure):
    """Forward and backward, and forward alone, beside what the counter makes of PyTorch's own products."""
    kernel, eager = FUNCTIONS[structure]
    tensors = make_inputs(structure, *SIZE, torch.float32)
    ours = counted(lambda: kernel(*tensors, impl="triton").sum().backward())
    assert ours == counted(lambda: eager(*tensors).sum().backward()) == 3 * expected_forward(tensors)


@pytest.mark.parametrize("structure", ["blast", "pivoted"])
def test_gradients_cost_twice_the_forward(structure):
    tensors = make_inputs(structure, *SIZE, torch.float32)
    ours = counted(lambda: FUNCTIONS[structure][0](*tensors, impl="triton").sum().backward())
    # BLAST mixes once more, to have z again
    again = 2 * len(tensors[0]) * math.prod(tensors[2].shape) if structure == "blast" else 0
    assert ours == 3 * expected_forward(tensors) + again


def test_frozen_factors_and_inputs_cost_nothing():
    x, u, v, bias = make_inputs("low_rank", *SIZE, torch.float32)
    x = x.detach()
    of_u, of_v = (2 * len(x) * factor.numel() for factor in (u, v))
    # the forward; du, dy and dv
    assert counted(lambda: ops.low_rank_linear(x, u, v, bias, impl="triton").sum().backward()) == 3 * of_u + 2 * of_v
    v = v.detach()
    assert counted(lambda: ops.low_rank_linear(x, u, v, bias, impl="triton").sum().backward()) == 2 * of_u + of_v


@pytest.mark.parametrize("structure", GROUPED)
def test_layers_that_run_together(structure):
    layers = [make_inputs(structure, 1, *SIZE[1:], torch.float32, seed=seed) for seed in (0, 1)]
    x, factors = layers[0][0].detach(), [tuple(t.detach() for t in layer[1:-1]) for layer in layers]
    expected = sum(expected_forward([x, *layer]) for layer in factors)
    assert counted(lambda: ops.grouped_linear(structure, x, factors, impl="triton")) == expected
    assert counted(lambda: ops.gated_linear(structure, x, factors, impl="triton")) == expected


def test_attention_of_one_query():
    from hf_blr.ops.attention import one_query_attention

    q, k = torch.randn(2, 6, 1, 16), torch.randn(2, 3, 20, 16)
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    assert counted(lambda: one_query_attention(q, k, k, mask, impl="triton")) == 2 * 2 * (2 * 6 * 16 * 20)


@pytest.mark.slow
def test_whichever_is_imported_first():
    code = (
        "import {}\nimport {}\nimport torch\nfrom torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.hf_blr.blast in flop_registry and torch.ops.hf_blr.blast_backward in flop_registry"
    )
    for order in (("hf_blr", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "hf_blr")):
        subprocess.run([sys.executable, "-c", code.format(*order)], check=True)
