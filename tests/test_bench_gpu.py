"""The whole-model forms on a GPU: every form says the same text, and none fails."""

import pytest
import torch
from tiny import tiny_llama, tiny_shape

from hf_blr.bench import measure, rows
from hf_blr.bench.forms import pieces_without_cache, with_compiled_pieces
from hf_blr.bench.layers import relative_error
from hf_blr.bench.one_block import with_one_block
from hf_blr.bench.profiling import profiled
from hf_blr.bench.rivals import RIVALS, missing
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant, build_model
from hf_blr.inference.replayed import StepGraph, stepping_by

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


STEPS = {
    "graph": lambda model: model.__call__,
    "norms and MLPs": lambda model: with_compiled_pieces(model.__call__, pieces_without_cache(model), "default"),
    "one block": lambda model: with_one_block(model, "default"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_captured_step_generates_the_same_text(step):
    from transformers import StaticCache

    model = tiny_llama().to("cuda")
    ids = torch.arange(10, device="cuda").view(2, 5)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 9}
    plain = model.generate(ids, **settings)
    cache = StaticCache(config=model.config, max_cache_len=16)
    step = StepGraph(STEPS[step](model), model.device)
    with stepping_by(model, step):
        for _ in range(2):
            cache.reset()
            assert model.generate(ids, past_key_values=cache, **settings).tolist() == plain.tolist()
    assert step.replay is not None


@pytest.mark.parametrize("form", ["eager", "graph", "compiled", "whole"])
@pytest.mark.parametrize("variant", ["dense", "low_rank", "pivoted", "monarch:4x4", "blast:4x4", "blast:4x4+fused"])
def test_every_measurement_in_every_form(variant, form):
    request = rows.Request(
        tokens=(64,),
        batches=(2,),
        forms=(form,),
        mode="default",
        decode_batches=(2,),
        prompt=8,
        new_tokens=12,
        training_tokens=64,
        stop_at_errors=True,
    )
    found = list(rows.model_rows("tiny", tiny_shape(), [Variant.parse(variant)], request, Timer("cuda", 0.05)))
    # training is measured eagerly too
    assert list(dict.fromkeys(row["measurement"] for row in found)) == list(measure.MEASUREMENTS)
    assert all(row["peak_bytes"] >= row["weight_bytes"] for row in found if row["measurement"] != "storage")


@pytest.mark.parametrize("form, library", [(form, name) for form, makers in RIVALS.items() for name in makers])
def test_rivals_multiply_what_they_are_compared_with(form, library):
    reason = missing(library)
    if reason:
        pytest.skip(reason)
    # a size that gemlite has settings for, and need not look for any
    weight = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16)
    forward, stored, exact = RIVALS[form][library](weight)
    for tokens in (1, 16):
        x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
        # float8 rounds inputs as well; kernels for four bits add zeros in 16 bits
        allowed = 0.05 if form == "fp8" else 0.02
        assert relative_error(forward(x, *stored), exact(x.double(), *stored)) < allowed
    assert relative_error(exact(x, *stored), x.double() @ weight.double().T) < (0.1 if form == "fp8" else 0.15)


def test_prefill_is_the_models_own_forward():
    model = build_model(tiny_shape(), Variant("dense"), 0.5, "cuda", torch.bfloat16)
    ids = torch.arange(12, device="cuda").view(2, 6)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with measure.maskless_attention(model, "text"):
            torch.testing.assert_close(model(input_ids=ids).logits, plain, rtol=2e-2, atol=2e-2)


def test_a_profile_adds_up_to_the_graphs_time():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    timer = Timer("cuda", 0.1)
    replay = timer.captured(lambda: torch.mm(a, b).add_(1.0))
    parts = profiled(replay)["parts"]
    # the profiler's own pauses lie outside of what it records; the clock may fall in between
    assert sum(parts.values()) == pytest.approx(timer.median(replay) * 1e3, rel=0.25)
    assert parts["products"] > 5 * parts["elementwise"] > 0
    assert parts["blr"] == parts["attention"] == 0


@pytest.mark.parametrize("variant, ours", [("dense", False), ("low_rank", True), ("blast:4x4+fused", True)])
def test_rows_say_where_a_steps_time_goes(variant, ours):
    request = rows.Request(
        measurements=("prefill", "decode"),
        tokens=(64,),
        batches=(2,),
        mode="default",
        decode_batches=(2,),
        prompt=8,
        new_tokens=12,
        profile=True,
        stop_at_errors=True,
    )
    found = list(rows.model_rows("tiny", tiny_shape(), [Variant.parse(variant)], request, Timer("cuda", 0.05)))
    assert [row["measurement"] for row in found] == ["prefill", "decode"]
    for row in found:
        parts = row["profile"]["parts"]
        assert min(parts.values()) >= 0
        assert parts["attention"] > 0 and parts["elementwise"] > 0
        listed = sum(kernel["ms"] for kernel in row["profile"]["kernels"])
        assert 0 < listed <= sum(parts.values()) - parts["idle"] + 1e-9
    # few tokens, where our kernels run whatever the structure
    assert (found[1]["profile"]["parts"]["blr"] > 0) == ours
