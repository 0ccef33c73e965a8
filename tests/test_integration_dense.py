"""Back to dense, and models that never were a checkpoint."""

import pytest
import torch
from tiny import build, tiny_bert, tiny_gpt2, tiny_llama, tiny_logits, tiny_vit
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from hf_blr.config import BLRConfig
from hf_blr.integration import (
    blr_modules,
    forget_plan,
    from_config,
    match_plan,
    record_plan,
    register,
    swap_in,
    to_dense,
)
from hf_blr.plan import resolve_plan

register()

CONFIG = BLRConfig("monarch", ratio=0.6)


def converted(model, config=CONFIG):
    """The model with random factors, as if it had been compressed in memory."""
    plan = resolve_plan(model, config)
    swap_in(model, plan)
    record_plan(model, config, plan)
    return model


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_vit])
def test_to_dense(make, tmp_path):
    model = converted(make())
    reference, kinds = tiny_logits(model), {type(m).__name__ for m in make().modules()}
    assert to_dense(model) is model
    assert {type(m).__name__ for m in model.modules()} == kinds
    torch.testing.assert_close(tiny_logits(model), reference, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
    assert torch.equal(tiny_logits(type(model).from_pretrained(tmp_path)), tiny_logits(model))
    with pytest.raises(ValueError, match="no BLR modules"):
        to_dense(model)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_vit])
def test_in_memory_conversion_saves_and_loads(make, tmp_path):
    model = converted(make())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


def test_record_and_forget():
    model, config = tiny_llama(), BLRConfig("low_rank", rank=6, dataset=["some text"])
    converted(model, config)
    stored = model.config.quantization_config
    assert sorted(stored.layers) == sorted(blr_modules(model))
    assert stored.dataset == "<list of 1 texts>"
    assert config.layers is None
    assert config.dataset == ["some text"]
    assert model.config._is_quantized
    assert "hf_blr" in model.model_tags
    forget_plan(model)
    assert not hasattr(model.config, "quantization_config")
    assert not model.config._is_quantized
    assert "hf_blr" not in model.model_tags


def test_plain_module_has_nothing_to_record():
    model = nn.Sequential(nn.ModuleList([nn.Linear(8, 9)]))
    plan = resolve_plan(model, BLRConfig("low_rank", rank=2))
    swap_in(model, plan)
    record_plan(model, BLRConfig("low_rank", rank=2), plan)
    assert not hasattr(model, "config")
    to_dense(model)
    assert type(model[0][0]) is nn.Linear


def test_from_config(tmp_path):
    model = from_config(tiny_llama().config, LlamaForCausalLM, blr_config=CONFIG)
    assert len(blr_modules(model)) == 14
    assert 0.05 < tiny_logits(model).std() < 5
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny_logits(LlamaForCausalLM.from_pretrained(tmp_path)), tiny_logits(model))
    stored = AutoConfig.from_pretrained(tmp_path)
    for new in (from_config(stored), from_config(stored, AutoModelForCausalLM, dtype=torch.bfloat16)):
        assert isinstance(new, LlamaForCausalLM)
        assert new.config.quantization_config == model.config.quantization_config
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}


def test_from_config_needs_one_blr_config_and_a_class():
    config = tiny_llama().config
    with pytest.raises(ValueError, match="got neither"):
        from_config(config, LlamaForCausalLM)
    with pytest.raises(ValueError, match="got both"):
        from_config(converted(tiny_llama()).config, LlamaForCausalLM, blr_config=CONFIG)
    config.architectures = None
    with pytest.raises(ValueError, match="pass model_class="):
        from_config(config, blr_config=CONFIG)


def test_module_names_of_an_older_release():
    # files keep the names that ViT's modules had when it was published
    model = tiny_vit()
    plan = resolve_plan(model, CONFIG)
    if "vit.layers.0.attention.q_proj" not in plan:
        pytest.skip("this release still uses those names")
    old = {"attention.q_proj": "attention.attention.query", "mlp.fc1": "intermediate.dense"}
    renamed = {
        f"vit.encoder.layer.0.{old[name.removeprefix('vit.layers.0.')]}": layer
        for name, layer in plan.items()
        if name.removeprefix("vit.layers.0.") in old
    }
    assert list(match_plan(model, renamed)) == ["vit.layers.0.attention.q_proj", "vit.layers.0.mlp.fc1"]


def test_module_names_with_and_without_the_prefix(caplog):
    plan = resolve_plan(tiny_gpt2(), CONFIG)
    base = build(GPT2LMHeadModel, tiny_gpt2().config).transformer
    assert list(match_plan(base, plan)) == [name.removeprefix("transformer.") for name in plan]
    with_head = {**plan, "score": next(iter(plan.values()))}
    assert list(match_plan(tiny_gpt2(), with_head)) == list(plan)
    assert "that no GPT2LMHeadModel has: score" in caplog.text
