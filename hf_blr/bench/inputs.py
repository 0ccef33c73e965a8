"""Random inputs of the models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def forward_inputs(model: nn.Module, kind: str, batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Random inputs of one forward.

    Raises:
        ValueError: if a text is longer than the model has positions, which on a GPU would end the process's use of it.
    """
    if kind == "text" and tokens > longest_text(model):
        raise ValueError(f"{type(model).__name__} has {longest_text(model)} positions, got {tokens} tokens; use fewer")
    config: Any = model.config
    generator = torch.Generator(device).manual_seed(0)
    dtype = next(model.parameters()).dtype
    if kind == "text":
        ids = torch.randint(0, config.vocab_size, (batch, tokens), device=device, generator=generator)
        return {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    if kind == "image":
        size = config.image_size
        shape = (batch, config.num_channels, size, size)
        pixels = torch.randn(shape, device=device, dtype=dtype, generator=generator)
        return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last)}
    size = config.sample_size
    latents = torch.randn(batch, 4, size, size, device=device, dtype=dtype, generator=generator)
    latents = latents.contiguous(memory_format=torch.channels_last)
    label = torch.ones(batch, device=device, dtype=torch.long)
    return {"hidden_states": latents, "timestep": label, "class_labels": label, "return_dict": False}


def longest_text(model: nn.Module) -> int:
    """The tokens of the longest text that a language model takes."""
    config: Any = model.config
    positions: int = config.max_position_embeddings
    return positions


def training_inputs(model: nn.Module, kind: str, batch: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """Inputs with labels. Raises NotImplementedError for diffusion models."""
    if kind == "diffusion":
        raise NotImplementedError("training steps are measured for text and image models")
    inputs = forward_inputs(model, kind, batch, tokens, device)
    if kind == "text":
        return {"input_ids": inputs["input_ids"], "labels": inputs["input_ids"], "use_cache": False}
    return {**inputs, "labels": torch.zeros(batch, device=device, dtype=torch.long)}
