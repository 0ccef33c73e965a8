"""Calibrations that give the same bits each time, also on a GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import batches_for, tiny_llama

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.calibration import pieces
from hf_blr.calibration.backwards import Backwards
from hf_blr.calibration.precision import Attention, RepeatableAttention
from hf_blr.calibration.store import Store

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def heads(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 7, 16, generator=generator).requires_grad_()


def gradients(attend, inputs):
    out = attend(*inputs)
    return out, torch.autograd.grad(out.square().sum(), inputs)


@pytest.mark.parametrize("groups", [False, True])
def test_gradients_of_attention_are_those_of_pytorch(groups):
    inputs = [heads(), heads(2 if groups else 4, 1), heads(2 if groups else 4, 2)]

    def attend(*qkv):
        return F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=groups)

    out, wanted = gradients(attend, inputs)
    with Attention():
        again, found = gradients(attend, inputs)
    assert "RepeatableAttention" in type(again.grad_fn).__name__
    torch.testing.assert_close(again, out)
    torch.testing.assert_close(found, wanted)


def test_only_the_backward_is_deterministic_and_only_meanwhile():
    seen = []

    def attend(q, k, v):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return q * k * v

    gradients(lambda *qkv: RepeatableAttention.apply(attend, *qkv), [heads(), heads(), heads()])
    assert seen == [False, True] and not torch.are_deterministic_algorithms_enabled()


def test_what_has_no_deterministic_form_runs_as_it_is():
    def attend(q, k, v):
        if torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("CuBLAS has its own opinion")
        return q * k * v

    inputs = [heads(), heads(seed=1), heads(seed=2)]
    _, found = gradients(lambda *qkv: RepeatableAttention.apply(attend, *qkv), inputs)
    q, k, v = inputs
    torch.testing.assert_close(found[0], 2 * q * (k * v).square())


def test_a_mask_that_trains_is_left_to_pytorch():
    mask = torch.zeros(7, 7, requires_grad=True)
    with Attention():
        out = F.scaled_dot_product_attention(heads(), heads(), heads(), attn_mask=mask)
    assert torch.autograd.grad(out.square().sum(), mask)[0].any()


def test_blocks_that_run_again_do_so_as_the_first_time(monkeypatch):
    calls, calibrating = [], pieces.calibrating
    # as where blocks do not follow one another
    monkeypatch.setattr(Backwards, "of", lambda *args: None)
    monkeypatch.setattr(pieces, "calibrating", lambda block: calls.append(block) or calibrating(block))
    model = tiny_llama()
    with Store(10_000) as store:
        collect_statistics(model, BLRConfig("low_rank", ratio=0.6), calibration=batches_for(model), store=store)
    assert set(calls) == set(model.model.layers)


@pytest.mark.gpu
@gpu
def test_two_runs_on_a_gpu_have_the_same_bits():
    model = tiny_llama(hidden_size=256, intermediate_size=384, max_position_embeddings=1024)
    model = model.to("cuda", torch.bfloat16)
    config = BLRConfig("low_rank", ratio=0.6)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 256, (4, 1000), generator=generator).cuda()} for _ in range(2)]
    one, other = (collect_statistics(model, config, calibration=batches) for _ in range(2))
    for kind in ("grams", "output_grams"):
        first, second = getattr(one, kind), getattr(other, kind)
        assert all(torch.equal(first[name], second[name]) for name in first)
    models = [copy.deepcopy(model) for _ in range(2)]
    for each in models:
        compress(each, config, calibration=batches, progress=False)
    first, second = (each.state_dict() for each in models)
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)
