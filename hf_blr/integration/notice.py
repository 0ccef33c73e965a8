"""Models whose config says that only this package loads them are built as if it said nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_blr.checkpoint.notice import NOTICE
from hf_blr.integration.on_import import wrap_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pass_notice(modeling: Any) -> None:
    """Let transformers take the notice for no choice of an attention implementation. A second call changes nothing."""

    def without_notice(original: Callable[..., str]) -> Callable[..., str]:
        def checked(self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
            asked = None if attn_implementation == NOTICE else attn_implementation
            return original(self, asked, *args, **kwargs)

        return checked

    wrap_once(modeling.PreTrainedModel, "_check_and_adjust_attn_implementation", without_notice)
