"""The attention function of fused models: one new token on a static cache by our kernel, all else by SDPA.

Between the projections of a decoded token, SDPA's kernels take longer to start than to run, and let the next layer's
weights wait until they are done. Part of `hf_blr.fuse`; for dense models, which gain as much, by itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_blr.ops.attention import by_kernel, suits_kernel

#: under which transformers knows it
NAME = "hf_blr_one_query"


def register_attention() -> None:
    """Make the name known, also to models that come by pickle."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use_attention(model: nn.Module) -> bool:
    """Let a transformers model that attends by SDPA attend by this function; False, and no change, for any other."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or getattr(config, "sub_configs", None):
        return False
    # transformers would warn of models that attend in their own way
    if not getattr(model, "_can_set_attn_implementation", lambda: False)():
        return False
    switch: Any = model.set_attn_implementation
    switch(NAME)
    return True


def restore_attention(model: nn.Module) -> None:
    """Undo `use_attention`."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME:
        switch: Any = model.set_attn_implementation
        switch("sdpa")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query `[B, HQ, T, D]`, key and value `[B, H, L, D]` -> (`[B, T, HQ, D]`, None)."""
    mask = None if dropout or unknown(kwargs) else attention_mask
    if mask is not None and suits_kernel(query, key, value, mask):
        return by_kernel(query, key, value, mask, scaling), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def unknown(kwargs: dict[str, Any]) -> bool:
    """Whether something is asked for that changes what attention computes and that the kernel does not know."""
    return any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
