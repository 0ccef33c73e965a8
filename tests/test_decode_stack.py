"""Stage one as a stack of products, at few tokens, under Triton's interpreter on the CPU."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import assert_grouped_within_budget, assert_within_budget, make_inputs, recorded_grids  # noqa: E402

from hf_blr.ops.triton import decode_stack  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_buffers"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU"),
]


@pytest.fixture
def grids(monkeypatch):
    """Every first stage of several blocks is such a stack; the grids that were launched."""
    for rule in ("monarch", "blast"):
        stacks = f"hf_blr.ops.rules.{rule}.stacks"
        monkeypatch.setattr(stacks, lambda tokens, groups, *sizes, **kw: tokens > 1 and groups > 1)
    return recorded_grids(monkeypatch, decode_stack, "decode_stack_kernel")


def guarded(*shape):
    """Random numbers between others that must not be read."""
    whole = torch.full([side + 3 for side in shape], float("nan"))
    part = whole[tuple(slice(side) for side in shape)]
    return part.copy_(torch.randn(shape))


@pytest.mark.parametrize("tokens", [2, 16, 17, 32])
@pytest.mark.parametrize("b1, b2, r, p", [(2, 3, 5, 20), (3, 2, 16, 33), (1, 4, 7, 16)])
def test_monarchs_first_stage(tokens, b1, b2, r, p):
    x, v = guarded(tokens, b1 * p), guarded(b1, b2 * r, p)
    whole = torch.full((b2 + 1, tokens + 2, b1 * r + 4), float("nan"))
    z = whole[:b2, :tokens, : b1 * r]
    decode_stack.project_swapped(x, v, z)
    exact = torch.einsum("tjp,jirp->itjr", x.view(tokens, b1, p), v.view(b1, b2, r, p)).reshape(z.shape)
    torch.testing.assert_close(z, exact)
    assert whole.isnan().sum() == whole.numel() - z.numel()


def test_a_stack_in_the_order_of_its_blocks():
    x, v = guarded(20, 3 * 24), guarded(3, 37, 24)
    y = torch.full((3, 20, 40), float("nan"))[..., :37]
    decode_stack.project_stack(x, v, y)
    torch.testing.assert_close(y, torch.einsum("tjp,jrp->jtr", x.view(20, 3, 24), v))


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["monarch", "blast"])
@pytest.mark.parametrize("tokens", [5, 32])
def test_whole_layers_and_groups(structure, tokens, grids):
    assert_within_budget(structure, make_inputs(structure, tokens, 3, 2, 20, 35, 7, torch.float32))
    assert_within_budget(structure, make_inputs(structure, tokens, 4, 4, 16, 24, 16, torch.float16))
    assert len(grids) == 2
    assert_grouped_within_budget(structure, tokens, [(35, 6)] * 3)
    assert_grouped_within_budget(structure, tokens, [(12, 8), (25, 6), (25, 6)], bias=False)
    assert len(grids) > 3


def test_which_first_stages_are_stacks(monkeypatch):
    grids = recorded_grids(monkeypatch, decode_stack, "decode_stack_kernel")
    for tokens in (1, 16, 17):
        assert_within_budget("monarch", make_inputs("monarch", tokens, 2, 2, 8, 8, 4, torch.float32))
        assert_within_budget("blast", make_inputs("blast", tokens, 2, 2, 8, 8, 4, torch.float32))
    assert grids == [(1, 2)]
