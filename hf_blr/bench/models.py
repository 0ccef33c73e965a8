"""Whole models of well-known shapes with random weights, dense or compressed: speed needs no others."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_blr.bench import shapes
from hf_blr.bench.shapes import Layer, align_rank
from hf_blr.config import BLRConfig
from hf_blr.dense import feature_sizes, is_transposed
from hf_blr.integration import record_plan, swap_in
from hf_blr.plan import LayerPlan, Plan, resolve_plan
from hf_blr.structures import as_block_pair
from hf_blr.targets import find_targets


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


def llama(**sizes):
    """A builder of Llama models; the sizes are `LlamaConfig`'s."""

    def build(**kw):
        from transformers import LlamaConfig, LlamaForCausalLM

        # without end-of-text tokens generation always runs its full length
        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return LlamaForCausalLM(LlamaConfig(**{"max_position_embeddings": 8192, **tokens, **sizes, **kw}))

    return build


def qwen3(**sizes):
    def build(**kw):
        from transformers import Qwen3Config, Qwen3ForCausalLM

        tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return Qwen3ForCausalLM(Qwen3Config(**{"max_position_embeddings": 8192, **tokens, **sizes, **kw}))

    return build


def gpt2(**sizes):
    def build(**kw):
        from transformers import GPT2Config, GPT2LMHeadModel

        tokens = {"bos_token_id": None, "eos_token_id": None}
        return GPT2LMHeadModel(GPT2Config(**{**tokens, **sizes, **kw}))

    return build


def vit(**sizes):
    def build(**kw):
        from transformers import ViTConfig, ViTForImageClassification

        return ViTForImageClassification(ViTConfig(**{**sizes, **kw}))

    return build


def dit(**sizes):
    def build(**kw):
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


@dataclass(frozen=True)
class Variant:
    """What a model's layers become: "dense", or a structure with the paper's ranks or with these blocks."""

    structure: str
    paper: bool = False
    blocks: tuple[int, int] | None = None

    @classmethod
    def parse(cls, text: str) -> Variant:
        """`dense`, `low_rank`, `blast:4x4`, `monarch:paper`. Raises ValueError for anything else."""
        structure, _, detail = text.partition(":")
        if structure == "dense" and not detail:
            return cls("dense")
        if structure not in ("low_rank", "monarch", "blast"):
            raise ValueError(f"expected dense, low_rank, monarch or blast (:paper or :B1xB2 after it), got {text!r}")
        if detail in ("", "paper"):
            return cls(structure, detail == "paper")
        try:
            numbers = [int(part) for part in detail.split("x")]
            return cls(structure, blocks=as_block_pair(numbers[0] if len(numbers) == 1 else tuple(numbers)))
        except ValueError:
            raise ValueError(f"expected blocks such as 4x16 after the colon, got {text!r}") from None

    def __str__(self):
        detail = "paper" if self.paper else "x".join(map(str, self.blocks)) if self.blocks else ""
        return f"{self.structure}:{detail}".rstrip(":")


def build_model(shape: Shape, variant: Variant, ratio: float, device: str, dtype: torch.dtype, **options) -> nn.Module:
    """The model in evaluation mode, its weights random, on the device.

    Args:
        shape: what to build.
        variant: what its layers become. The factors are random too, nothing is fitted.
        ratio: kept / dense parameters of each replaced layer, where the paper's ranks are not asked for.
        device, dtype: of all parameters.
        **options: for `shape.build`.

    Raises:
        ValueError: if the paper's ranks are asked for and it has none.
    """
    with torch.device(device), default_dtype(dtype):
        model = shape.build(**options).eval()
        if variant.structure == "dense":
            return model
        plan = plan_for(model, shape, variant, ratio)
        swap_in(model, plan)
    record_plan(model, BLRConfig(variant.structure, ratio=ratio, num_blocks=variant.blocks), plan)
    return model


def plan_for(model: nn.Module, shape: Shape, variant: Variant, ratio: float) -> Plan:
    """{module: sizes}: the paper's layers and ranks, or the default targets at `ratio` with ranks the kernels like."""
    if not variant.paper:
        config = BLRConfig(variant.structure, ratio=ratio, num_blocks=variant.blocks)
        return {name: replace(p, spec=align_rank(p.spec)) for name, p in resolve_plan(model, config).items()}
    return paper_plan(model, shape, variant.structure)


def paper_plan(model: nn.Module, shape: Shape, structure: str) -> Plan:
    """The paper's layers at the paper's ranks.

    Raises:
        ValueError: if it has none for this model or structure, or they are not in this model in their sizes.
    """
    if not shape.paper:
        raise ValueError("the paper has no ranks for this model; leave :paper out")
    plan, found = {}, set()
    pattern = "|".join(f"({layer.modules})" for layer in shape.paper)
    for name in find_targets(model, rf"(.*\.)?({pattern})"):
        module = model.get_submodule(name)
        layer = next(x for x in shape.paper if re.fullmatch(rf"(.*\.)?({x.modules})", name))
        if feature_sizes(module) != (layer.in_features, layer.out_features):
            raise ValueError(f"{name} is {feature_sizes(module)}, the paper's {layer.name} is not")
        plan[name] = LayerPlan(layer.paper_spec(structure), module.bias is not None, is_transposed(module))
        found.add(layer)
    missing = [layer.name for layer in shape.paper if layer not in found]
    if missing:
        raise ValueError(f"this release of the model has no {', '.join(missing)} by the names known here")
    return plan


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
