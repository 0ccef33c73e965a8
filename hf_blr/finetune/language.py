"""Which models predict the next token of a text, and the perplexities of their losses."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


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


def perplexities(logs: Mapping[str, float], lm_loss: float | None) -> dict[str, float]:
    """{name: perplexity} of the losses of a causal language model in a `Trainer`'s log.

    Args:
        lm_loss: the model's own, where "loss" is mixed with another one.
    """
    losses = {"perplexity": logs.get("loss") if lm_loss is None else lm_loss}
    for name in logs:
        if name.startswith("eval_") and name.endswith("_loss"):
            losses[name.removesuffix("loss") + "perplexity"] = logs[name]
    return {name: exp(loss) for name, loss in losses.items() if loss is not None}


def exp(loss: float) -> float:
    # beyond the largest double, where exp raises instead of returning inf
    return math.inf if loss > 709 else math.exp(loss)
