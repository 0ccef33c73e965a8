"""Whole models of well-known shapes, built from their configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from hf_blr.bench import shapes
from hf_blr.bench.shapes import Layer


@dataclass(frozen=True)
class Shape:
    """One model.

    Args:
        kind: "text" (a causal language model), "image" (ViT) or "diffusion" (DiT).
        build: makes the dense model on the current default device, in the current default dtype.
        paper: the layers that the paper compresses, with its ranks; empty where it has none.
        prefill: tokens of a forward; for images and latents those are given by the picture's size.
        options: variants of `build`, {tokens: keyword arguments}, where the size of the input is part of the model.
    """

    kind: str
    build: Callable[..., nn.Module]
    paper: tuple[Layer, ...] = ()
    prefill: tuple[int, ...] = (128, 1024, 4096)
    options: dict[int, dict] | None = None

    def options_for(self, tokens: int) -> dict:
        return (self.options or {}).get(tokens, {})

    def of_blocks(self, count: int) -> Shape:
        """The same model with so many blocks."""
        blocks = "num_layers" if self.kind == "diffusion" else "num_hidden_layers"
        return replace(self, build=partial(self.build, **{blocks: count}))


def of_transformers(config_class: str, model_class: str, **sizes: Any) -> Callable[..., nn.Module]:
    """A builder of models of these classes; the sizes are the config's."""

    def build(**kw: Any) -> nn.Module:
        import transformers

        config = getattr(transformers, config_class)(**{**sizes, **kw})
        return getattr(transformers, model_class)(config)

    return build


#: without an end-of-text token, generation always runs its full length
ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
llama = partial(of_transformers, "LlamaConfig", "LlamaForCausalLM", max_position_embeddings=8192, **ENDLESS)
qwen3 = partial(of_transformers, "Qwen3Config", "Qwen3ForCausalLM", max_position_embeddings=8192, **ENDLESS)
gpt2 = partial(of_transformers, "GPT2Config", "GPT2LMHeadModel", **ENDLESS)
vit = partial(of_transformers, "ViTConfig", "ViTForImageClassification")


def dit(**sizes: Any) -> Callable[..., nn.Module]:
    def build(**kw: Any) -> nn.Module:
        try:
            from diffusers import DiTTransformer2DModel
        except ImportError:
            raise ImportError('DiT models need diffusers: pip install "hf-blr[dit]"') from None
        return DiTTransformer2DModel(**{**sizes, **kw})

    return build


SHAPES: dict[str, Shape] = {
    "Llama-7B": Shape(
        "text",
        llama(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        shapes.LLAMA_7B,
    ),
    "Llama-3-8B": Shape(
        "text",
        llama(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
    ),
    "Llama-3.2-1B": Shape(
        "text",
        llama(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            tie_word_embeddings=True,
        ),
        shapes.LLAMA_1B,
    ),
    "Qwen3-4B": Shape(
        "text",
        qwen3(
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    ),
    # GPT-2 has 1024 positions
    "GPT2-S": Shape("text", gpt2(), shapes.GPT2_S, prefill=(128, 384, 1024)),
    # 14 x 14 patches and the class token
    "ViT-B/16": Shape("image", vit(num_labels=1000), shapes.VIT_B_SPLIT, prefill=(197,)),
    # 256 tokens are 256 px; the paper's 16384 a latent of 256 x 256
    "DiT-XL/2": Shape(
        "diffusion",
        dit(num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28),
        shapes.DIT_XL_2_SPLIT,
        prefill=(256, 16384),
        options={256: {"sample_size": 32}, 16384: {"sample_size": 256}},
    ),
}


def shape_of(name: str) -> Shape | None:
    """That of a row's model, `Llama-3-8B` or `Llama-3-8B, 8 blocks`; None where the name is not known."""
    base, _, blocks = name.partition(", ")
    shape = SHAPES.get(base)
    return shape.of_blocks(int(blocks.removesuffix(" blocks"))) if shape and blocks else shape
