"""Attention of one query: the kernel under Triton's interpreter, and fused models that use it."""

import copy
import json
import pickle

import pytest
import torch
from kernel_cases import attention_inputs
from tiny import tiny_inputs, tiny_llama, tiny_logits
from transformers import StaticCache

import hf_blr
from hf_blr import BLRConfig, ops
from hf_blr.inference import attention
from hf_blr.ops.attention import by_kernel, one_query_attention, suits_kernel

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu.py runs the kernels on the GPU")


@interpreted
@pytest.mark.parametrize("batch, heads, groups, length, d", [(1, 3, 1, 64, 16), (2, 2, 3, 70, 24), (1, 2, 1, 7, 16)])
def test_the_kernel_is_sdpa(batch, heads, groups, length, d):
    pytest.importorskip("triton")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        tensors = attention_inputs(batch, heads, groups, length, d, dtype)
        got = one_query_attention(*tensors, impl="triton")
        expected = one_query_attention(*(t.double() if t.is_floating_point() else t for t in tensors), impl="reference")
        assert got.shape == (batch, 1, heads * groups, d) and got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@interpreted
def test_pieces_that_see_nothing_and_long_caches(monkeypatch):
    pytest.importorskip("triton")
    from hf_blr.ops.triton import attend

    monkeypatch.setattr(attend, "KEYS", 16)
    monkeypatch.setattr(attend, "PIECES", 2)
    # several keys at a time, several pieces, several pieces at a time; another scale
    for length, seen in ((600, 530), (90, 5), (16, 16)):
        tensors = attention_inputs(1, 2, 2, length, 16, seen=seen)
        got = one_query_attention(*tensors, scale=0.5, impl="triton")
        torch.testing.assert_close(got, one_query_attention(*tensors, scale=0.5, impl="reference"))


@interpreted
def test_keys_that_are_no_rows_of_one_block(monkeypatch):
    pytest.importorskip("triton")
    q, k, v, mask = attention_inputs(2, 2, 2, 20, 16)
    expected = one_query_attention(q, k, v, mask, impl="reference")
    # what a static cache longer than its batch, and a transposed projection, give
    longer = torch.full((3, 2, 30, 16), float("nan"))
    longer[:2, :, :20] = k
    transposed = v.transpose(1, 2).contiguous().transpose(1, 2)
    folded = q.transpose(1, 3).contiguous().transpose(1, 3)
    # as every other number of a longer mask, and one mask for all texts
    strided = torch.stack([mask, ~mask], -1)[..., 0]
    got = one_query_attention(folded, longer[:2, :, :20], transposed, strided, impl="triton")
    torch.testing.assert_close(got, expected)
    got = one_query_attention(q, k, v, mask[:1].expand(2, -1, -1, -1), impl="triton")
    torch.testing.assert_close(got[0], expected[0])


@interpreted
def test_nothing_seen_gives_zeros():
    pytest.importorskip("triton")
    for length in (20, 100):
        q, k, v, mask = attention_inputs(2, 2, 1, length, 16)
        mask[0] = False
        out = one_query_attention(q, k, v, mask, impl="triton")
        assert torch.equal(out[0], torch.zeros_like(out[0])) and out[1].isfinite().all()


def test_shapes_that_do_not_fit_are_named():
    q, k, v, mask = attention_inputs(1, 2, 2, 8, 16)
    for wrong in ((q[:, :3], k, v, mask), (q, k, v[:, :1], mask), (q, k, v, mask[..., 1:]), (q, k, v, mask.float())):
        with pytest.raises(ValueError, match="expected q"):
            one_query_attention(*wrong)


@interpreted
def test_what_the_kernel_is_left_out_of():
    pytest.importorskip("triton")
    q, k, v, mask = attention_inputs(1, 2, 2, 8, 16)
    with ops.use_impl("triton"):
        assert suits_kernel(q, k, v, mask)
        assert not suits_kernel(torch.cat([q, q], 2), k, v, mask) and not suits_kernel(q, k, v, None)
        assert not suits_kernel(q, k, v, mask.float()) and not suits_kernel(q, k, v[..., :8], mask)
        assert not suits_kernel(q.clone().requires_grad_(), k, v, mask)
        assert not suits_kernel(q, k.expand(1, 2, 8, 16).repeat(1, 1, 1000, 1), v.repeat(1, 1, 1000, 1), mask)
    # float32 is left to PyTorch
    assert not suits_kernel(q, k, v, mask)


def fused(**sizes):
    """Factors of one layer a block: kernels of layers take the interpreter much longer than that of attention."""
    model = tiny_llama(**sizes)
    hf_blr.compress(model, BLRConfig("low_rank", rank=4, target_modules=["o_proj"]), progress=False)
    hf_blr.fuse(model)
    return model


@pytest.fixture
def queries(monkeypatch):
    """The shape of every query that the kernel's op was called for."""
    pytest.importorskip("triton")
    found = []
    monkeypatch.setattr(attention, "by_kernel", lambda q, *rest: found.append(tuple(q.shape)) or by_kernel(q, *rest))
    return found


@pytest.mark.slow
@interpreted
def test_a_fused_model_generates_the_same_on_a_static_cache(queries):
    model = fused(num_hidden_layers=1)
    ids = tiny_inputs(model)["input_ids"][:2, :4]
    settings = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True}
    hf_blr.unfuse(model)
    expected = model.generate(ids, cache_implementation="static", **settings)
    hf_blr.fuse(model)
    with ops.use_impl("triton"):
        assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)
        # two steps after the prompt
        assert len(queries) == 2
        # the prompt, a cache that grows and training do without
        queries.clear()
        assert torch.equal(model.generate(ids, **settings), expected)
        model(ids, labels=ids).loss.backward()
    assert not queries


@pytest.mark.slow
@interpreted
def test_masked_prompts(queries):
    model = fused(num_hidden_layers=1)
    ids = tiny_inputs(model)["input_ids"][:2, :4]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    settings = {"max_new_tokens": 3, "do_sample": False, "disable_compile": True, "cache_implementation": "static"}
    expected = model.generate(ids, attention_mask=mask, **settings)
    assert not queries
    with ops.use_impl("triton"):
        assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)
    assert queries


@pytest.mark.slow
@interpreted
def test_it_compiles_as_one_graph(queries):
    model = fused(num_hidden_layers=1)
    ids = tiny_inputs(model)["input_ids"][:1, :5]
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad(), ops.use_impl("triton"):
        model(ids[:, :4], past_key_values=cache)
        expected = model(ids[:, 4:], past_key_values=copy.deepcopy(cache)).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(ids[:, 4:], past_key_values=cache).logits, expected)
    assert queries


@interpreted
def test_opcheck():
    pytest.importorskip("triton")
    q, k, v, mask = attention_inputs(1, 2, 2, 8, 16)
    torch.library.opcheck(torch.ops.hf_blr.one_query_attention.default, (q, k, v, mask, 0.25))


def test_files_and_pickles_know_nothing_of_it(tmp_path):
    model = fused()
    assert model.config._attn_implementation == attention.NAME
    model.save_pretrained(tmp_path)
    assert attention.NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny_logits(again), tiny_logits(model))
    hf_blr.unfuse(model)
    assert model.config._attn_implementation == "sdpa"


def test_other_attention_is_left_alone(monkeypatch):
    model = tiny_llama()
    model.set_attn_implementation("eager")
    hf_blr.compress(model, BLRConfig("low_rank", ratio=0.6), progress=False)
    hf_blr.fuse(model)
    assert model.config._attn_implementation == "eager"
    hf_blr.unfuse(model)
    assert model.config._attn_implementation == "eager"
    # a part of a model has no say in it
    assert not attention.use_attention(model.model.layers[0])
    # nor is a model asked that attends in its own way
    own = tiny_llama()
    monkeypatch.setattr(type(own), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert not attention.use_attention(own) and own.config._attn_implementation == "sdpa"


def test_what_the_kernel_does_not_know_goes_to_sdpa(queries):
    assert attention.unknown({"position_bias": torch.zeros(1)}) and not attention.unknown({"position_bias": None})
    q, k, v, mask = attention_inputs(1, 2, 1, 8, 16)
    with ops.use_impl("triton" if not torch.cuda.is_available() else "auto"):
        module = torch.nn.Module()
        out, _ = attention.attention_forward(module, q, k, v, mask, scaling=0.5, position_bias=torch.zeros(1, 2, 1, 8))
    assert not queries
    torch.testing.assert_close(out, one_query_attention(q, k, v, mask, 0.5, impl="reference"))
