"""Layers that share their input, against the same layers one by one, under Triton's interpreter on the CPU."""

import pytest
import torch
from kernel_cases import FUNCTIONS, GROUPED, assert_grouped_within_budget, make_layers

from hf_blr import ops

STRUCTURES = list(GROUPED)
pytestmark = pytest.mark.usefixtures("poisoned_buffers")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU")
#: (Q, R) of each layer
EQUAL, GROUPED_QUERIES, ALL_DIFFERENT = [(10, 6)] * 3, [(12, 8), (5, 6), (5, 6)], [(9, 5), (6, 4), (3, 2)]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_reference_is_each_layer_alone(structure):
    factors, biases = make_layers(structure, GROUPED_QUERIES, dtype=torch.float64)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    outs = ops.grouped_linear(structure, x, factors, biases, impl="reference")
    for out, f, b in zip(outs, factors, biases, strict=True):
        assert torch.equal(out, FUNCTIONS[structure][1](x, *f, b))


@interpreted
@pytest.mark.parametrize("sizes", [EQUAL, GROUPED_QUERIES, ALL_DIFFERENT], ids=["equal", "grouped", "different"])
@pytest.mark.parametrize("tokens", [1, 5, 37])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_packed_layers_keep_the_error_budget(structure, tokens, sizes):
    pytest.importorskip("triton")
    assert_grouped_within_budget(structure, tokens, sizes)
    assert_grouped_within_budget(structure, tokens, sizes, bias=False)


@interpreted
@pytest.mark.parametrize("tokens", [3, 35])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_layers_that_lie_apart_run_one_by_one(structure, tokens):
    pytest.importorskip("triton")
    assert_grouped_within_budget(structure, tokens, EQUAL, packed=False)


@interpreted
@pytest.mark.parametrize("blocks", [(4, 5), (16, 2)], ids=str)
@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("tokens", [2, 34])
def test_blast_with_many_blocks(tokens, rank, blocks):
    pytest.importorskip("triton")
    for sizes in ([(3, rank)] * 2, [(3, rank), (2, rank + 1)]):
        assert_grouped_within_budget("blast", tokens, sizes, b1=blocks[0], b2=blocks[1], p=4, bias=False)


@pytest.mark.slow
@interpreted
def test_mix_inside_the_last_stage(monkeypatch):
    pytest.importorskip("triton")
    # in all layers, and in the first alone
    for smallest in (0, 12):
        rule = "hf_blr.ops.rules.blast.fuses_mix"
        monkeypatch.setattr(rule, lambda b1, b2, q, r, t, smallest=smallest: q >= smallest)
        for dtype in (torch.float32, torch.float16):
            assert_grouped_within_budget("blast", 35, EQUAL, dtype=dtype)
            assert_grouped_within_budget("blast", 35, GROUPED_QUERIES, dtype=dtype, bias=False)


@interpreted
@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_tokens_and_any_leading_shape(structure):
    pytest.importorskip("triton")
    factors, biases = make_layers(structure, EQUAL)
    assert [o.shape for o in ops.grouped_linear(structure, torch.randn(0, 16), factors, biases, impl="triton")] == [
        (0, f[0].shape[:-1].numel()) for f in factors
    ]
    x = torch.randn(4, 3, 16).transpose(0, 1)
    outs = ops.grouped_linear(structure, x, factors, biases, impl="triton")
    expected = ops.grouped_linear(structure, x, factors, biases, impl="reference")
    torch.testing.assert_close(outs, expected)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("structure", ["monarch", "blast"])
def test_opcheck(structure):
    pytest.importorskip("triton")
    factors, biases = make_layers(structure, GROUPED_QUERIES)
    op = getattr(torch.ops.hf_blr, f"grouped_{structure}")
    torch.library.opcheck(op, (torch.randn(3, 16), *map(list, zip(*factors, strict=True)), biases))
    factors, biases = make_layers(structure, EQUAL[:2])
    op = getattr(torch.ops.hf_blr, f"grouped_{structure}_gated")
    torch.library.opcheck(op, (torch.randn(1, 16), *map(list, zip(*factors, strict=True)), biases, "silu"))


def test_layers_that_do_not_fit_are_refused():
    (one, other), _ = (make_layers("blast", [(4, 2)], b2=b2)[0] for b2 in (3, 2)), None
    with pytest.raises(ValueError, match="same block counts"):
        ops.grouped_linear("blast", torch.randn(2, 16), one + other)
