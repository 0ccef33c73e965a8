"""The last stage whose programs loop over tiles of rows, against float64, under Triton's interpreter on the CPU."""

import pytest
import torch

triton = pytest.importorskip("triton")
from kernel_cases import (  # noqa: E402
    GROUPED,
    assert_grouped_within_budget,
    assert_within_budget,
    make_inputs,
    recorded_grids,
)

from hf_blr.ops.rules.few_tokens import DecodeConfig  # noqa: E402
from hf_blr.ops.triton import decode_expand, decode_wide  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU"),
]

#: one program and three for each multiprocessor of the interpreter, which has one
CONFIGS = [DecodeConfig(8, 16, 4, 2, programs=1, ahead=2), DecodeConfig(16, 16, 2, 3, programs=3)]


@pytest.fixture(params=CONFIGS, ids=str)
def grids(request, monkeypatch):
    """Every last stage runs by this setting; the grids that were launched."""
    monkeypatch.setattr(decode_expand, "expand_config", lambda *sizes: request.param)
    return recorded_grids(monkeypatch, decode_wide, "decode_expand_wide_kernel")


def error_and_allowed(blocks, q, r, tokens, dtype, bias=True):
    """Of `decode_expand`, and of the same product in PyTorch; all but the outputs' own storage starts as NaN."""
    generator = torch.Generator().manual_seed(0)
    z, u, b = (
        (torch.randn(s, generator=generator) * scale).to(dtype)
        for s, scale in (((blocks, tokens, r), 1), ((blocks, q, r), r**-0.5), (blocks * q, 1))
    )
    # rows of u followed by what must not be read, outputs by what must not be written
    u = torch.cat([u, torch.full((blocks, q, 3), float("nan"), dtype=dtype)], 2)[..., :r]
    wide = torch.full((tokens + 1, blocks * q + 5), float("nan"), dtype=dtype)
    decode_expand.decode_expand(z, u, b if bias else None, wide[:tokens, : blocks * q])
    assert wide[tokens:].isnan().all() and wide[:, blocks * q :].isnan().all()

    def product(z, u, b):
        out = (z @ u.mT).transpose(0, 1).reshape(tokens, blocks * q)
        return out + b if bias else out

    exact = product(z.double(), u.double(), b.double())
    eager = product(z, u, b)
    allowed = 2 * (eager - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    return (wide[:tokens, : blocks * q] - exact).norm(), allowed


@pytest.mark.parametrize("tokens", [2, 7, 16, 17])
@pytest.mark.parametrize("blocks, q, r", [(1, 75, 93), (3, 20, 64), (2, 8, 5), (4, 41, 150)])
def test_outputs_keep_the_error_budget(grids, blocks, q, r, tokens):
    error, allowed = error_and_allowed(blocks, q, r, tokens, torch.float32)
    assert error <= allowed
    (grid,) = grids
    assert grid[1] == blocks


@pytest.mark.parametrize("bias", [True, False])
def test_float16_keeps_the_error_budget(grids, bias):
    # the interpreter multiplies no bfloat16
    error, allowed = error_and_allowed(2, 35, 72, 16, torch.float16, bias)
    assert error <= allowed


def test_programs_take_several_tiles_each(grids):
    error_and_allowed(1, 200, 20, 4, torch.float32)
    assert grids[0][0] <= 3 < 200 // 16


@pytest.mark.slow
@pytest.mark.parametrize("structure", GROUPED)
def test_whole_layers_and_groups(grids, structure):
    assert_within_budget(structure, make_inputs(structure, 5, 3, 2, 20, 35, 7, torch.float32))
    assert_grouped_within_budget(structure, 5, [(35, 6)] * 3)
    assert_grouped_within_budget(structure, 5, [(12, 8), (25, 6), (25, 6)], bias=False)
    assert len(grids) >= 3
