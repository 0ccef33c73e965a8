"""Whether a model, its text and the counts that were asked for make a perplexity."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from hf_blr.text import can_write
from hf_blr.text.windows import check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_counts(
    model: PreTrainedModel, seqlen: int, stride: int, batch_size: int | None, max_windows: int | None
) -> None:
    if seqlen < 2:
        raise ValueError(f"seqlen must be at least 2, one token to read and one to predict; got {seqlen}")
    if not 1 <= stride <= seqlen:
        raise ValueError(f"stride must be between 1 and seqlen={seqlen}, got {stride}")
    for name, value in (("batch_size", batch_size), ("max_windows", max_windows)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_positions(model, seqlen)


def check_causal(model: PreTrainedModel) -> None:
    """Raises TypeError for what is no model, or if its logits say nothing of the next token, be there one for each."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"perplexity(model, tokenizer, dataset) takes a loaded model first, got a {type(model).__name__}: give "
            "AutoModelForCausalLM.from_pretrained(name)"
        )
    if can_write(model):
        return
    if getattr(model.config, "is_encoder_decoder", False):
        reason = "its decoder is fed with another text than its encoder"
    else:
        reason = "it sees the token that it is asked for, or predicts none"
    raise TypeError(
        f"{type(model).__name__} is no causal language model ({reason}), so it has no perplexity; compare its "
        "outputs with the dense model's, or its scores on a task"
    )
