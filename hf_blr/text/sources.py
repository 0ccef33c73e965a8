"""From any dataset to windows of tokens: text that is read, text that the model writes, and mixtures."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from hf_blr.config.texts import (
    DEFAULT,
    DEFAULT_TEXT,
    DEFAULT_WITHOUT_WRITING,
    SELF_CHAT,
    describe,
    is_mixture,
    needs_writing,
)
from hf_blr.text.documents import load_text
from hf_blr.text.kept import is_kept, kept_windows
from hf_blr.text.mixtures import mixed_windows
from hf_blr.text.windows import CHARACTERS_PER_TOKEN, Tokenizer, windows_of
from hf_blr.text.written import can_write, write_windows

logger = logging.getLogger(__name__)


def load_windows(
    dataset: Any,
    model: Any,
    tokenizer: Tokenizer,
    seqlen: int,
    num_samples: int,
    seed: int = 0,
    *,
    progress: bool = True,
) -> Tensor:
    """Windows of a dataset's training split, token ids `[n, seqlen]`, n at most `num_samples`.

    Args:
        dataset: what `load_text` takes; "self" and "self:chat", which the model writes (`write_windows`); a
            .safetensors file of windows (`keep_windows`); a mixture of names and paths, {source: share}, whose shares
            count windows and need not add up to one; or "default".
        model: writes, if that is asked for.
        tokenizer: of the model.
        seqlen: tokens in a window.
        num_samples: windows at most.
        seed: which windows of a longer text, and what the model writes.
        progress: show a progress bar while the model writes.

    Raises:
        ValueError: if a count is below one, the text is shorter than one window, a share comes to no window, or a file
            holds no windows that fit; also what `load_text` and `write_windows` raise.
    """
    for name, value in (("seqlen", seqlen), ("num_samples", num_samples)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    dataset = resolve_dataset(dataset, model)
    if is_mixture(dataset):
        return mixed_windows(
            dataset,
            num_samples,
            seed,
            lambda name, count: load_windows(name, model, tokenizer, seqlen, count, seed, progress=progress),
        )
    if needs_writing(dataset):
        chat = dataset == SELF_CHAT
        return write_windows(model, tokenizer, num_samples, seqlen, seed, chat=chat, progress=progress)
    if is_kept(dataset):
        return kept_windows(dataset, model, seqlen, num_samples, seed)
    enough = CHARACTERS_PER_TOKEN * seqlen * num_samples
    documents = load_text(dataset, "train", tokenizer, enough=enough, seed=seed)
    return windows_of(tokenizer, documents, seqlen, num_samples, seed)


def reads_text(model: Any) -> bool:
    """Whether the model can do with text alone: those that classify images or hear sounds cannot."""
    text = getattr(model, "input_modalities", "text")
    if text == "text" or tuple(text) == ("text",):
        return True
    return getattr(model, "main_input_name", "input_ids") == "input_ids" and can_write(model)


def resolve_dataset(dataset: Any, model: Any) -> Any:
    """What "default" stands for with this model, None if that reads no text; any other dataset as it is."""
    if not (isinstance(dataset, str) and dataset == DEFAULT):
        return dataset
    if not reads_text(model):
        logger.warning(
            "%s does not run on text alone, and is fitted to its weights; images or sounds make it better",
            type(model).__name__,
        )
        return None
    if needs_writing(DEFAULT_TEXT) and not can_write(model):
        logger.warning(
            "%s cannot write text of its own; the default text is %s then",
            type(model).__name__,
            describe(DEFAULT_WITHOUT_WRITING),
        )
        return DEFAULT_WITHOUT_WRITING
    return DEFAULT_TEXT


def scored_dataset(dataset: Any, model: Any) -> Any:
    """The text to measure perplexity on beside a dataset: itself, or "builtin" where it has no held-out documents."""
    dataset = resolve_dataset(dataset, model)
    has_documents = not (is_mixture(dataset) or needs_writing(dataset) or is_kept(dataset))
    return dataset if has_documents else DEFAULT_WITHOUT_WRITING
