"""Randomly initialised models of a few thousand parameters, and a tokenizer that needs no hub.

Every size divides by BLAST's default 4 x 16 blocks. The same call gives the same weights.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

#: the 256 bytes and the end-of-text token
VOCAB_SIZE = 257
EOS_ID = 256


def build(model_class, config, seed=0):
    """The model in evaluation mode, with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()


def tiny_llama(seed=0, **kw) -> LlamaForCausalLM:
    """Two blocks, 14 projections; k and v are narrower than q (grouped queries). `kw` goes to the config."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    tokens = {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    # weights large enough that a wrong matrix shows in the logits
    return build(LlamaForCausalLM, LlamaConfig(**{**sizes, **heads, **tokens, "initializer_range": 0.1, **kw}), seed)


def tiny_gpt2(seed=0, **kw) -> GPT2LMHeadModel:
    """Two blocks, 8 projections, all `Conv1D`; the head is tied to the embedding."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCAB_SIZE}
    tokens = {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID}
    return build(GPT2LMHeadModel, GPT2Config(**{**sizes, **tokens, "initializer_range": 0.1, **kw}), seed)


def tiny_bert(seed=0, **kw) -> BertForSequenceClassification:
    """Two blocks, 12 projections; pooler and classifier are linear layers outside the blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    more = {
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 3,
        "initializer_range": 0.1,
    }
    return build(BertForSequenceClassification, BertConfig(**{**sizes, **more, **kw}), seed)


def tiny_vit(seed=0, **kw) -> ViTForImageClassification:
    """Two blocks, 12 projections; images are 3 x 16 x 16."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    image = {"image_size": 16, "patch_size": 8, "num_labels": 3, "initializer_range": 0.1}
    return build(ViTForImageClassification, ViTConfig(**{**sizes, **image, **kw}), seed)


def tiny_t5(seed=0, **kw) -> T5ForConditionalGeneration:
    """Two blocks on each side, 28 projections; `wo` stays dense, as the model holds it in float32."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB_SIZE}
    return build(T5ForConditionalGeneration, T5Config(**{**sizes, "decoder_start_token_id": 0, **kw}), seed)


def tiny_mixtral(seed=0, **kw) -> MixtralForCausalLM:
    """Two blocks, 12 projections, two of each block a tensor of four experts."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return build(MixtralForCausalLM, MixtralConfig(**{**sizes, **heads, "initializer_range": 0.1, **kw}), seed)


def tiny_qwen3(seed=0, **kw) -> Qwen3ForCausalLM:
    """Two blocks, 14 projections; heads are wider than hidden size by their number, q and k are normalised."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128}
    return build(Qwen3ForCausalLM, Qwen3Config(**{**sizes, **heads, "initializer_range": 0.1, **kw}), seed)


def tiny_llava() -> LlavaForConditionalGeneration:
    """A vision tower and a language model of two blocks each."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(vocab_size=257, initializer_range=0.1, **sizes)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **sizes)
    return build(
        LlavaForConditionalGeneration, LlavaConfig(vision_config=vision, text_config=text, image_token_index=256)
    )


def tiny_inputs(model, seed=1) -> dict[str, torch.Tensor]:
    """A batch of two that the model's forward takes."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    inputs = {"input_ids": torch.randint(0, 256, (2, 12), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(0, 256, (2, 7), generator=generator)
    return inputs


def batches_for(model, count=3) -> list[dict[str, torch.Tensor]]:
    """Batches to calibrate with, all of one shape."""
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        return [{"pixel_values": torch.randn(8, 3, 16, 16, generator=generator)} for _ in range(count)]
    return [{"input_ids": torch.randint(0, 256, (8, 24), generator=generator)} for _ in range(count)]


@torch.no_grad()
def tiny_logits(model) -> torch.Tensor:
    """The model's logits (or last hidden states) on `tiny_inputs`, in float32."""
    return model(**tiny_inputs(model))[0].float()


def divergence(dense, model, batches) -> float:
    """Mean KL divergence of the model's predictions from the dense model's."""
    total = 0.0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.log_softmax(-1) for m in (dense, model))
            total += (p.exp() * (p - q)).sum(-1).mean().item()
    return total / len(batches)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, plus `<|end|>`; saves and loads as any fast tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)} | {"<|end|>": EOS_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<|end|>", "eos_token": "<|end|>", "pad_token": "<|end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)


@torch.no_grad()
def with_low_rank_weights(model, rank=6):
    """The same model with every projection inside its blocks cut to this rank, so that a fit can be exact."""
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and any(part.isdigit() for part in name.split(".")):
            u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
            module.weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    return model


def tiny_shape(**kw):
    """A Llama for the whole-model benchmark, one kind of whose layers the paper is said to compress."""
    from hf_blr.bench.models import Shape, llama
    from hf_blr.bench.shapes import Layer

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    paper = (Layer("q,o", 64, 64, 16, (16, 4), 4, "[qo]_proj"),)
    return Shape("text", llama(**{**sizes, **heads, **kw}), paper, prefill=(16,))
