"""A small random model of each architecture, 64 wide and two blocks deep, by the kind of data that it takes.

{name: (class, its config's class, settings)}; nested configs are dicts, as their classes take them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from hf_blr.targets import find_targets

WORDS, PAD, END, IMAGE = 260, 257, 256, 255

WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
RANGE = {"initializer_range": 0.1}
ENDS = {"bos_token_id": END, "eos_token_id": END}
TEXT = {"vocab_size": WORDS, "max_position_embeddings": 128, "pad_token_id": PAD, **WIDE, **RANGE}
LM = {**TEXT, **ENDS, "num_key_value_heads": 2}
GPT = {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, **ENDS, **RANGE}
HEADS = {"head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
PICTURE = {"image_size": 16, "patch_size": 8, "num_labels": 3}
STAGES = {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "num_labels": 3}
SIDES = {
    "d_model": 64,
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in
       (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))},
    "vocab_size": WORDS, "pad_token_id": PAD, **ENDS, "init_std": 0.1,
}  # fmt: skip
ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
PATCHES = {"depth": 2, "hidden_size": 64, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
           "temporal_patch_size": 2, "in_channels": 3, **RANGE}  # fmt: skip
MARKS = {"image_token_id": IMAGE, "video_token_id": 254, "vision_start_token_id": 253, "vision_end_token_id": 252}
NARROW_TEXT = {**TEXT, **ENDS, "max_position_embeddings": 32}

# one architecture after the other, as a table would have them
# fmt: off
#: {kind of data: {architecture: (model, config, settings)}}
ZOO: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "text": {
        "llama": ("LlamaForCausalLM", "LlamaConfig", LM),
        "mistral": ("MistralForCausalLM", "MistralConfig", LM | {"sliding_window": None}),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", LM),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LM | HEADS),
        "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LM | HEADS | {"query_pre_attn_scalar": 16, "sliding_window":
            4}),
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", LM | HEADS | {"sliding_window": 4, "layer_types":
            ["sliding_attention", "full_attention"]}),
        "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", LM | HEADS | {"global_head_dim": 16,
            "vocab_size_per_layer_input": WORDS, "hidden_size_per_layer_input": 16, "num_hidden_layers": 4,
            "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4}),
        "phi3": ("Phi3ForCausalLM", "Phi3Config", LM | {"original_max_position_embeddings": 128}),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
        "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT | ENDS),
        "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 8, "n_inner": 128}),
        "opt": ("OPTForCausalLM", "OPTConfig", TEXT | ENDS | {"ffn_dim": 128, "word_embed_proj_dim": 64, "init_std":
            0.1}),
        "bloom": ("BloomForCausalLM", "BloomConfig", {"vocab_size": WORDS, "hidden_size": 64, "n_layer": 2,
            "n_head": 4, **ENDS, **RANGE}),
        "stablelm": ("StableLmForCausalLM", "StableLmConfig", LM),
        "cohere": ("CohereForCausalLM", "CohereConfig", LM),
        "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LM),
        "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", LM),
        "granite": ("GraniteForCausalLM", "GraniteConfig", LM),
        "glm4": ("Glm4ForCausalLM", "Glm4Config", LM | HEADS),
        "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LM | EXPERTS | {"num_key_value_heads": 4,
            "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
            "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts":
            1}),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", LM | {"num_local_experts": 4, "num_experts_per_tok": 2,
            "sliding_window": None}),
        "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", LM | {"intermediate_size": 64, "num_experts": 4,
            "num_experts_per_tok": 2}),
        "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", LM | EXPERTS | {"num_experts": 4,
            "shared_expert_intermediate_size": 64}),
        "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", LM | EXPERTS | HEADS | {"num_experts": 4}),
        "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", LM | HEADS | {"num_local_experts": 4,
            "num_experts_per_tok": 2, "sliding_window": 4}),
        "mamba": ("MambaForCausalLM", "MambaConfig", {"vocab_size": WORDS, "hidden_size": 64, "state_size": 8,
            "num_hidden_layers": 2, "pad_token_id": PAD, **ENDS, **RANGE}),
        "falcon": ("FalconForCausalLM", "FalconConfig", {"vocab_size": WORDS, "hidden_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, **ENDS, **RANGE}),
        "bert": ("BertForMaskedLM", "BertConfig", TEXT),
        "bert_model": ("BertModel", "BertConfig", TEXT),
        "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT | {"pad_token_id": 1, "bos_token_id": 0,
            "eos_token_id": 2}),
        "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig", {"vocab_size": WORDS, "dim": 64, "hidden_dim":
            128, "n_layers": 2, "n_heads": 4, "pad_token_id": PAD, **RANGE}),
        "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", TEXT | ENDS | {"cls_token_id": END,
            "sep_token_id": END, "local_attention": 4, "global_attn_every_n_layers": 2}),
        "deberta_v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", TEXT | {"relative_attention": True,
            "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}),
        "electra": ("ElectraForMaskedLM", "ElectraConfig", TEXT | {"embedding_size": 32}),
        "albert": ("AlbertForMaskedLM", "AlbertConfig", TEXT | {"embedding_size": 32, "num_hidden_layers": 4,
            "num_hidden_groups": 2, "inner_group_num": 2}),
        "longformer": ("LongformerForMaskedLM", "LongformerConfig", TEXT | {"pad_token_id": 1, "attention_window": 4}),
        "regression": ("LlamaForSequenceClassification", "LlamaConfig", LM | {"num_labels": 1}),
    },
    "text to text": {
        "t5": ("T5ForConditionalGeneration", "T5Config", {"vocab_size": WORDS, "d_model": 64, "d_kv": 16, "d_ff":
            128, "num_layers": 2, "num_heads": 4, "pad_token_id": PAD, "eos_token_id": END,
            "decoder_start_token_id": PAD}),
        "bart": ("BartForConditionalGeneration", "BartConfig", SIDES | {"max_position_embeddings": 128,
            "decoder_start_token_id": END, "forced_eos_token_id": END}),
    },
    "audio to text": {
        "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", SIDES | {"num_mel_bins": 8,
            "max_source_positions": 32, "max_target_positions": 64, "decoder_start_token_id": 255,
            "suppress_tokens": None, "begin_suppress_tokens": None}),
    },
    "audio": {
        "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", WIDE | RANGE | {"vocab_size": 12, "pad_token_id": 0,
            "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2), "feat_extract_norm": "layer",
            "do_stable_layer_norm": True, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}),
    },
    "images": {
        "vit": ("ViTForImageClassification", "ViTConfig", WIDE | RANGE | PICTURE),
        "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", WIDE | RANGE | PICTURE | {"mlp_ratio": 2}),
        "swin": ("SwinForImageClassification", "SwinConfig", RANGE | STAGES | {"window_size": 2}),
        "swinv2": ("Swinv2ForImageClassification", "Swinv2Config", RANGE | STAGES | {"window_size": 2}),
    },
    "images and text": {
        "clip": ("CLIPModel", "CLIPConfig", {"text_config": NARROW_TEXT, "vision_config": WIDE | RANGE | PICTURE,
            "projection_dim": 32}),
        "siglip": ("SiglipModel", "SiglipConfig", {"text_config": NARROW_TEXT | {"projection_size": 64},
            "vision_config": WIDE | RANGE | PICTURE}),
    },
    "text with images": {
        "llava": ("LlavaForConditionalGeneration", "LlavaConfig", {"vision_config": WIDE | RANGE | PICTURE |
            {"model_type": "clip_vision_model"}, "text_config": LM | {"model_type": "llama"}, "image_token_index":
            IMAGE, "vision_feature_layer": -1, "image_seq_length": 4}),
        "qwen2_vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", {"text_config": LM | ROTARY,
            "vision_config": PATCHES | {"embed_dim": 64, "mlp_ratio": 2}, **MARKS}),
        "qwen3_vl": ("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", {"text_config": LM | HEADS | ROTARY,
            "vision_config": PATCHES | {"intermediate_size": 128, "out_hidden_size": 64, "num_position_embeddings":
            16, "deepstack_visual_indexes": [0]}, **MARKS}),
    },
    "latents": {
        "dit": ("DiTTransformer2DModel", "", {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}),
    },
}
# fmt: on

#: {architecture: why nothing of it can be compressed here}
LEFT_OUT: dict[str, str] = {}
try:
    import diffusers
except ImportError:
    LEFT_OUT["dit"] = "diffusers is not installed"

#: {architecture: layers that read no batch but tables of positions, once a forward}
OF_POSITIONS = {"deberta_v2": ("pos_key_proj", "pos_query_proj"), "swinv2": ("continuous_position_bias_mlp.2",)}

#: {architecture: kind of data}
KINDS = {name: kind for kind, members in ZOO.items() for name in members}


def build(name: str) -> nn.Module:
    """The model in evaluation mode, with random biases: one that is dropped shows."""
    made, config, settings = ZOO[KINDS[name]][name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if not config:
            model = getattr(diffusers, made)(**settings).eval()
        else:
            model = getattr(transformers, made)(getattr(transformers, config)(**settings)).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias") and parameter.dim() == 1:
                    parameter += 0.1 * torch.randn(parameter.shape)
    return model


def linear_targets(model: nn.Module) -> list[str]:
    """The target layers without the experts that lie in 3-D parameters, which statistics leave out."""
    modules = dict(model.named_modules())
    return [name for name in find_targets(model) if name in modules]


def reads_positions(name: str, layer: str) -> bool:
    """Whether a layer's inputs are no sums over the batch's positions."""
    return layer.endswith(OF_POSITIONS.get(name, ("no layer",)))
