"""Monarch's last stage, in place and after a copy, under Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import assert_grouped_within_budget, assert_within_budget, make_inputs  # noqa: E402

from hf_blr.ops.triton import block_gemm, monarch, swap  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU"),
]


@pytest.mark.parametrize("tokens", [1, 6, 65])
@pytest.mark.parametrize("b1, b2, r", [(2, 3, 16), (4, 1, 48), (1, 5, 32), (3, 2, 7), (3, 2, 20)])
def test_the_copy_is_the_permutation(b1, b2, r, tokens):
    # as wide as several layers' y, of which this is a part
    whole = torch.randn(b1, tokens, b2 * r + 64)
    y = whole[..., 32 : 32 + b2 * r]
    z = swap.swap_blocks(y, b2)
    assert torch.equal(z, y.unflatten(2, (b2, r)).permute(2, 1, 0, 3).flatten(2))


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_both_ways_keep_the_error_budget(in_place, bias, monkeypatch):
    swaps, run = [], block_gemm.block_gemm
    monkeypatch.setattr("hf_blr.ops.rules.monarch.reads_swapped", lambda *sizes, **kw: in_place)
    monkeypatch.setattr(monarch, "block_gemm", lambda *a, swap, **kw: swaps.append(swap) or run(*a, swap=swap, **kw))
    for sizes in ((40, 2, 3, 8, 20, 16), (33, 4, 2, 5, 17, 6)):
        assert_within_budget("monarch", make_inputs("monarch", *sizes, torch.float32, bias=bias))
    assert_grouped_within_budget("monarch", 40, [(12, 16), (25, 6), (25, 6)], bias=bias)
    assert bool(swaps) == in_place and all(swaps)
