"""Models that do with their layers, or their files, what no other family does."""

import copy

import pytest
import torch
from tiny import build
from transformers import (
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    FlaubertConfig,
    FlaubertModel,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    RwkvConfig,
    RwkvForCausalLM,
    TrOCRConfig,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from hf_blr import BLRConfig, collect_statistics, compress, to_dense
from hf_blr.linear import blr_modules

SIZES = {"hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.1}


def rwkv():
    """In evaluation it divides weights of the second block by 2, of the third by 4; in training it takes that back."""
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "vocab_size": 97}
    return build(RwkvForCausalLM, RwkvConfig(**sizes, num_hidden_layers=3, rescale_every=1))


@pytest.mark.parametrize("form", ["plain", "int8"])
def test_a_model_that_rescales_its_weights_before_it_runs(form, tmp_path):
    model, ids = rwkv().train(), torch.arange(24).view(2, 12)
    compress(model, BLRConfig("low_rank", ratio=0.6, factor_format=form), progress=False)
    assert {"attention.output", "feed_forward.value"} <= {name.partition("blocks.2.")[2] for name in blr_modules(model)}
    model.save_pretrained(tmp_path)
    loaded, dense = (RwkvForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    to_dense(dense)
    with torch.no_grad():
        for training in (False, True, False):
            # the second time it is where it was
            wanted = dense.train(training)(ids).logits
            torch.testing.assert_close(loaded.train(training)(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_family_whose_files_hold_a_bias_beside_its_layer(tmp_path):
    image = {"image_size": 16, "patch_size": 8, "num_frames": 2, "tubelet_size": 2}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    model = build(VideoMAEForVideoClassification, VideoMAEConfig(**SIZES, **image, **heads))
    layer = model.videomae.encoder.layer[0].attention.attention
    torch.nn.init.normal_(layer.query.bias)
    compress(model, BLRConfig("low_rank", ratio=0.6), progress=False)
    model.save_pretrained(tmp_path)
    loaded, video = VideoMAEForVideoClassification.from_pretrained(tmp_path), torch.randn(2, 2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(video).logits, model(video).logits)
    assert blr_modules(loaded).keys() == blr_modules(model).keys()


def test_a_family_that_clamps_weights_of_small_layers_in_training():
    few = {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 97,
        "laurel_rank": 8,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97, "pad_token_id": 0}
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    sizes = SIZES | {"intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0]}
    model = build(Gemma3nForCausalLM, Gemma3nTextConfig(**sizes, **few, **heads, **layers)).train()
    compress(model, BLRConfig("low_rank", ratio=0.6), progress=False)
    assert not any(".altup." in name for name in blr_modules(model))
    model(torch.arange(24).view(2, 12)).logits.square().mean().backward()
    assert all(factor.grad is not None for layer in blr_modules(model).values() for factor in layer.factors().values())


def test_a_family_that_picks_what_it_attends_to_without_a_gradient():
    lora = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    picks = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, "first_k_dense_replace": 2}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 97}
    model = build(DeepseekV32ForCausalLM, DeepseekV32Config(**SIZES, **lora, **picks, **heads, n_routed_experts=2))
    batches = [{"input_ids": torch.arange(48).view(4, 12)}]
    report = compress(model, BLRConfig("low_rank", ratio=0.6), calibration=batches, progress=False)
    assert report.fitted_to == "activations" and not any("indexer" in name for name in blr_modules(model))
    named = BLRConfig("low_rank", ratio=0.6, target_modules=["indexer.wk", "o_proj"])
    statistics = collect_statistics(to_dense(model), named, calibration=batches)
    felt = {name: statistics.felt(name) for name in statistics.grams}
    assert len(felt) == 4 and all(felt[name] == name.endswith("o_proj") for name in felt)


def test_a_model_of_two_models_whose_decoder_would_keep_what_it_saw():
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    reader = {"vocab_size": 97, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(**SIZES, **heads, image_size=16, patch_size=8),
        TrOCRConfig(**reader, cross_attention_hidden_size=32, max_position_embeddings=32),
    )
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = build(VisionEncoderDecoderModel, config)
    labels = torch.arange(2, 16).view(2, 7)
    batches = [{"pixel_values": torch.randn(2, 3, 16, 16), "labels": labels + i} for i in range(2)]
    report = compress(model, BLRConfig("low_rank", ratio=0.6), calibration=batches, progress=False)
    assert report.fitted_to == "activations" and any(layer.name.startswith("decoder") for layer in report.layers)


def test_a_family_that_fills_a_cache_whatever_it_is_told():
    sizes = {"vocab_size": 97, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 32}
    dense = build(FlaubertModel, FlaubertConfig(**sizes))
    batches = [{"input_ids": torch.arange(5, 77).view(6, 12) + number} for number in range(3)]
    errors = []
    for how in (batches, None):
        model = copy.deepcopy(dense)
        compress(model, BLRConfig("low_rank", ratio=0.5), calibration=how, progress=False)
        with torch.no_grad():
            errors.append((model(**batches[0])[0] - dense(**batches[0])[0]).norm())
    assert errors[0] < 0.8 * errors[1]
