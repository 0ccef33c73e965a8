"""What a training says at its start: what trains, and what may not do what is meant."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import logging

from hf_blr.calibration.training_form import CODES, FACTOR_CODES, SCALES, trained_bits
from hf_blr.finetune.trainable import factor_parameters, fresh_head, has_adapters
from hf_blr.linear import blr_modules

logger = logging.get_logger(__name__)

TRAINS = {SCALES: "scales", FACTOR_CODES: "scales and factors' codes", CODES: "codes and scales"}


def what_trains(model: nn.Module, extra: list[str], bits: str, float8_layers: list[str]) -> str:
    """In words.

    Args:
        extra: what was asked for besides the factors.
        bits: what trains of factors in bits.
        float8_layers: those that multiply in float8.
    """
    modules = blr_modules(model)
    parts = ["factors"] if any(layer.factors() for layer in modules.values()) else []
    parts += [f"{TRAINS[bits]} of factors in bits"] if trained_bits(model) else []
    parts += (["a fresh head"] if fresh_head(model) else []) + extra
    what = "the PEFT adapters on" if has_adapters(model) else f"{', '.join(parts)} of"
    products = f", {len(float8_layers)} of them with products in float8" if float8_layers else ""
    return f"{what} a model with {len(modules)} BLR modules{products}"


def warn_of_decay(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    factors = {id(factor) for factor in factor_parameters(model) if factor.requires_grad}
    decay = [g["weight_decay"] for g in optimizer.param_groups if any(id(p) in factors for p in g["params"])]
    if any(decay):
        logger.warning(
            f"weight_decay={max(decay)} applies to the factors, which lowers the rank of their products "
            "instead of shrinking the weights: set it to 0, or use factor_parameter_groups"
        )


def warn_of_rounding(model: nn.Module) -> None:
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
    if narrow:
        dtype = str(model.get_parameter(narrow[0]).dtype).removeprefix("torch.")
        logger.warning(
            f"{narrow[0]} and {len(narrow) - 1} more parameters train in {dtype}, which rounds small steps away: load "
            "the model in float32, and set bf16=True in the TrainingArguments to compute in bfloat16"
        )
