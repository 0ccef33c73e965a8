"""With which tokens a text that a model writes begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_blr.config.texts import SELF, SELF_CHAT
from hf_blr.text.windows import check_ids


def beginnings_for(model: Any, tokenizer: Any, chat: bool, beginnings: Tensor | None) -> Tensor:
    """Token ids `[m, b]` with which windows begin in turn: those given, else an empty document, or a user's turn.

    Raises:
        ValueError: as of `write_windows`.
    """
    if beginnings is None:
        return torch.tensor([chat_opening(tokenizer) if chat else [first_token(model, tokenizer)]])
    check_beginnings(model, beginnings, chat)
    return beginnings


def first_token(model: Any, tokenizer: Any) -> int:
    """The token that begins a document: the beginning-of-sequence token, or the end of the document before."""
    config = model.config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        for source in (tokenizer, config):
            token = getattr(source, name, None)
            if token is not None:
                return token[0] if isinstance(token, list) else token
    raise ValueError(
        f"neither {type(tokenizer).__name__} nor the config of {type(model).__name__} names a token that begins or "
        "ends a document: set tokenizer.bos_token"
    )


def chat_opening(tokenizer: Any) -> list[int]:
    """The tokens of the chat template up to where the user's first words would stand."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f'"{SELF_CHAT}" begins with the chat template, and {type(tokenizer).__name__} has none: take "{SELF}"'
        )
    words = "words-of-the-user"
    text = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False)
    opening, found, _ = text.partition(words)
    # a blank at the end belongs to the token of the first word
    opening = opening.rstrip(" ")
    if not (found and opening):
        raise ValueError(
            f'the chat template of {type(tokenizer).__name__} opens a user\'s turn with nothing: take "{SELF}"'
        )
    return tokenizer(opening, add_special_tokens=False)["input_ids"]


def check_beginnings(model: Any, beginnings: Tensor, chat: bool) -> None:
    """Raises ValueError if they are no rows of token ids of the model, or a chat is asked for too."""
    if chat:
        raise ValueError("windows begin with the chat template or with beginnings, not with both: leave one out")
    if beginnings.dim() != 2 or not beginnings.numel() or beginnings.dtype != torch.long:
        raise ValueError(
            f"beginnings must be token ids [m, b], int64, got {beginnings.dtype} of {list(beginnings.shape)}: "
            "hf_blr.text.load_windows makes them of a text"
        )
    check_ids(model, beginnings)
