"""Models whose config says that only this package loads them are built as if it said nothing."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from hf_blr.checkpoint.notice import NOTICE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pass_notice(modeling: Any) -> None:
    """Let transformers take the notice for no choice of an attention implementation. A second call changes nothing."""
    original = modeling.PreTrainedModel._check_and_adjust_attn_implementation
    if hasattr(original, "hf_blr_wrapper"):
        return

    @functools.wraps(original)
    def checked(self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        asked = None if attn_implementation == NOTICE else attn_implementation
        chosen: str = original(self, asked, *args, **kwargs)
        return chosen

    wrapper: Any = checked
    wrapper.hf_blr_wrapper = True
    modeling.PreTrainedModel._check_and_adjust_attn_implementation = wrapper
