"""The programs that stay of one token, under Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import (  # noqa: E402
    FUNCTIONS,
    assert_grouped_within_budget,
    assert_within_budget,
    make_inputs,
    recorded_grids,
)

from hf_blr.ops.rules.few_tokens import OneConfig  # noqa: E402
from hf_blr.ops.triton import decode_one, decode_one_mix  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU"),
]

#: one program with one row at a time, and with more than there are; rows in many steps, and in one
# a row and sixteen columns at a time is many steps for the interpreter
CONFIGS = [
    pytest.param(OneConfig(1, 16, 1, 1), marks=pytest.mark.slow),
    OneConfig(4, 16, 4, 3),
    OneConfig(16, 64, 4, 2),
]


@pytest.fixture(params=CONFIGS, ids=str)
def config(request, monkeypatch):
    """Every product runs by this setting."""
    monkeypatch.setattr(decode_one, "one_config", lambda *sizes: request.param)
    monkeypatch.setattr(decode_one_mix, "one_mix_config", lambda *sizes: request.param)
    return request.param


@pytest.mark.parametrize("structure", FUNCTIONS)
def test_the_error_budget(structure, config):
    for size in ((3, 2, 20, 18, 7), (4, 4, 16, 24, 16)):
        assert_within_budget(structure, make_inputs(structure, 1, *size, torch.float32))
    assert_within_budget(structure, make_inputs(structure, 1, 2, 3, 12, 35, 6, torch.float16, bias=False))


@pytest.mark.parametrize("structure", ["low_rank", "monarch", "blast"])
def test_grouped(structure, config):
    assert_grouped_within_budget(structure, 1, [(12, 8), (25, 6)])


def product(w, x, gated):
    """`[blocks * Q]` of w `[blocks, Q, R]` and x `[blocks, R]`, those of the second half on top of the first's."""
    out = torch.einsum("iqr,ir->iq", w, x)
    first, second = out.chunk(2) if gated else (out, None)
    return (torch.nn.functional.silu(first) * second if gated else first).flatten()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("q", [1, 4, 13])
def test_nothing_beside_its_tensors_is_read_or_written(q, gated, config):
    blocks, r = 4, 21
    w = torch.full((blocks, q + 2, r + 3), float("nan"))
    w[:, :q, :r] = torch.randn(blocks, q, r)
    z = torch.full((blocks, 1, r + 1), float("nan"))
    z[..., :r] = torch.randn(blocks, 1, r)
    w, z = w[:, :q, :r], z[..., :r]
    outputs = q * blocks // (2 if gated else 1)
    out = torch.full((1, outputs + 5), float("nan"))
    decode_one.expand_one(z, w, None, out[:, :outputs], "silu" if gated else "", gated)
    torch.testing.assert_close(out[0, :outputs], product(w, z[:, 0], gated))
    assert out[:, outputs:].isnan().all()


def test_the_grid_is_no_larger_than_the_work(monkeypatch):
    grids = recorded_grids(monkeypatch, decode_one, "decode_one_kernel")
    monkeypatch.setattr(decode_one, "one_config", lambda *sizes: OneConfig(4, 16, 4, 8))
    for blocks, q in ((2, 9), (2, 90), (16, 90)):
        z, u, out = torch.randn(blocks, 1, 7), torch.randn(blocks, q, 7), torch.empty(1, blocks * q)
        decode_one.expand_one(z, u, None, out, "", False)
    # three tiles; the programs of the one multiprocessor, divided among the blocks; never none
    assert grids == [(3, 2), (4, 2), (1, 16)]
