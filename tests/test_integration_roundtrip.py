"""Dense checkpoint -> factors -> saved -> loaded, over families, structures and dtypes."""

import os

import pytest
import torch
import transformers
from tiny import (
    build,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_logits,
    tiny_mixtral,
    tiny_t5,
    tiny_vit,
    with_low_rank_weights,
)
from transformers import AutoModel

from hf_blr.config import BLRConfig
from hf_blr.integration import blr_modules, register

register()

FAMILIES = {"llama": (tiny_llama, 14), "gpt2": (tiny_gpt2, 8), "bert": (tiny_bert, 12), "vit": (tiny_vit, 12)}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def compressed(model, folder, config):
    model.save_pretrained(folder / "dense")
    return type(model).from_pretrained(folder / "dense", blr_config=config)


def test_exact_rank_gives_the_dense_logits(family, tmp_path):
    make, count = family
    dense = with_low_rank_weights(make())
    model = compressed(dense, tmp_path, BLRConfig("low_rank", rank=6))
    assert len(blr_modules(model)) == count
    torch.testing.assert_close(tiny_logits(model), tiny_logits(dense), rtol=1e-4, atol=1e-4)


def test_sharded_save_and_plain_load_are_bit_exact(family, tmp_path):
    make, count = family
    model = compressed(make(), tmp_path, BLRConfig("monarch", ratio=0.6))
    model.save_pretrained(tmp_path / "blr", max_shard_size="20KB")
    assert len([file for file in os.listdir(tmp_path / "blr") if file.endswith(".safetensors")]) > 1
    loaded = type(model).from_pretrained(tmp_path / "blr")
    assert len(blr_modules(loaded)) == count
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    assert loaded.config.quantization_config == model.config.quantization_config


@pytest.mark.parametrize("structure", ["low_rank", "pivoted", "monarch", "blast"])
def test_every_structure_survives_the_file(structure, tmp_path):
    model = compressed(tiny_llama(), tmp_path, BLRConfig(structure, ratio=0.5, fit_rounds=2))
    model.save_pretrained(tmp_path / "blr")
    loaded = type(model).from_pretrained(tmp_path / "blr")
    assert {module.spec.structure for module in blr_modules(loaded).values()} == {structure}
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


def test_base_model_loads_from_a_model_with_a_head_and_back(family, tmp_path):
    make, count = family
    model = compressed(make(), tmp_path, BLRConfig("low_rank", ratio=0.5))
    model.save_pretrained(tmp_path / "blr")
    base = AutoModel.from_pretrained(tmp_path / "blr")
    assert type(base) is not type(model)
    assert len(blr_modules(base)) == count
    base.save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    state = model.state_dict()
    factors = [key for key in state if key.endswith((".u", ".v"))]
    assert len(factors) == 2 * count
    for key in factors:
        assert torch.equal(again.state_dict()[key], state[key]), key


def test_requested_dtype_reaches_every_parameter(family, tmp_path):
    # ViT's names differ between file and model, which makes some releases skip the cast
    make, _ = family
    model = compressed(make(), tmp_path, BLRConfig("low_rank", ratio=0.5))
    model.save_pretrained(tmp_path / "blr")
    for model_class in (type(model), AutoModel):
        loaded = model_class.from_pretrained(tmp_path / "blr", dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_dense_checkpoint_loads_into_a_lower_dtype(tmp_path):
    dense = with_low_rank_weights(tiny_llama())
    dense.save_pretrained(tmp_path)
    config = BLRConfig("low_rank", rank=6)
    model = type(dense).from_pretrained(tmp_path, blr_config=config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (tiny_logits(model) - tiny_logits(dense)).norm() < 0.05 * tiny_logits(dense).norm()


def test_t5_keeps_its_float32_layer_dense(tmp_path):
    model = compressed(tiny_t5(), tmp_path, BLRConfig("low_rank", ratio=0.5))
    assert len(blr_modules(model)) == 28
    assert not [name for name in blr_modules(model) if name.endswith(".wo")]
    model.save_pretrained(tmp_path / "blr")
    loaded = type(model).from_pretrained(tmp_path / "blr", dtype=torch.float16)
    kept = {parameter.dtype for name, parameter in loaded.named_parameters() if name.endswith(".wo.weight")}
    assert kept == {torch.float32}
    assert loaded.encoder.block[0].layer[0].SelfAttention.q.u.dtype == torch.float16


def test_mixture_of_experts_without_its_routers(tmp_path):
    model = compressed(tiny_mixtral(), tmp_path, BLRConfig("low_rank", ratio=0.5))
    assert len(blr_modules(model)) == 12
    assert not [name for name in blr_modules(model) if name.endswith(".gate")]
    model.save_pretrained(tmp_path / "blr")
    loaded = type(model).from_pretrained(tmp_path / "blr")
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


@pytest.mark.skipif(not hasattr(transformers, "NomicBertModel"), reason="this release has no NomicBert")
@pytest.mark.parametrize("targets", [None, ["k_proj"]], ids=["all", "k only"])
def test_family_that_stores_q_k_v_fused(targets, tmp_path):
    # unequal ranks cannot be concatenated, as saving would try; k alone is not what the loader asks about
    dense = build(transformers.NomicBertModel, transformers.NomicBertConfig(**SIZES, vocab_size=257))
    dense = with_low_rank_weights(dense)
    config = BLRConfig("low_rank", rank=6, overrides={"k_proj": {"rank": 7}}, target_modules=targets)
    model = compressed(dense, tmp_path, config)
    torch.testing.assert_close(tiny_logits(model), tiny_logits(dense), rtol=1e-4, atol=1e-4)
    assert len(blr_modules(model)) == (2 if targets else 14)
    model.save_pretrained(tmp_path / "blr")
    loaded = type(model).from_pretrained(tmp_path / "blr")
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
