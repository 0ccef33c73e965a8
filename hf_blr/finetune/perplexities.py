"""Perplexities beside the losses that a Trainer logs."""

from __future__ import annotations

import math

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def perplexities(logs: dict[str, float], metrics: dict[str, float]) -> dict[str, float]:
    """{name: perplexity} of the losses of a causal language model.

    Args:
        logs: of the Trainer: "loss", and the losses of evaluations.
        metrics: of the distillation; its "lm_loss" is then the loss on the text.
    """
    losses = {"perplexity": metrics.get("lm_loss", logs.get("loss"))}
    for name in logs:
        if name.startswith("eval_") and name.endswith("_loss"):
            losses[name.removesuffix("loss") + "perplexity"] = logs[name]
    return {name: exp(loss) for name, loss in losses.items() if loss is not None}


def is_causal_lm(model: nn.Module) -> bool:
    """Whether it is a causal language model, inside `torch.compile`, data-parallel and PEFT wrappers."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    under_adapters = getattr(model, "get_base_model", None)
    if under_adapters is not None:
        model = under_adapters()
    names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    # FSDP2 puts a subclass of its own in the model's place
    return any(cls.__name__ in names for cls in type(model).__mro__)


def exp(loss: float) -> float:
    # beyond the largest double, where exp raises instead of returning inf
    return math.inf if loss > 709 else math.exp(loss)
