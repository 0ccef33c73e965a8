"""From documents to windows of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: text (and keywords) -> an encoding with "input_ids": a tokenizer of transformers, or what behaves like one
Tokenizer = Callable[..., Any]

#: so many characters hold a token almost always, and twice as many as one holds on average
CHARACTERS_PER_TOKEN = 8
#: a piece of text begins at the first white space among so many characters, if there is one
LONGEST_WORD = 64


def check_tokenizer(tokenizer: Any) -> None:
    """Raises TypeError for what cannot be called with text, such as a tokenizer's name."""
    if not callable(tokenizer):
        raise TypeError(
            f"tokenizer= takes a tokenizer, got a {type(tokenizer).__name__}: give AutoTokenizer.from_pretrained(name)"
        )


def tokenize(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """Token ids `[T]` of the documents joined by two newlines and tokenised once, as GPTQ and its successors
    do.

    A tokenizer that opens each text with a beginning-of-sequence token does so once, at the very start.

    Raises:
        TypeError: for one string in the place of a list.
    """
    if isinstance(documents, str):
        raise TypeError("tokenize takes a list of strings; for one string pass [text]")
    # verbose=False: the text is cut into windows later, its length says nothing
    return torch.tensor(tokenizer("\n\n".join(documents), verbose=False)["input_ids"], dtype=torch.long)


def sample_windows(tokens: Tensor, seqlen: int, num_samples: int, seed: int = 0) -> Tensor:
    """Windows `[n, seqlen]` of consecutive tokens that do not overlap, in the order of the text.

    Args:
        tokens: ids `[T]`.
        seqlen: tokens in a window.
        num_samples: the most windows to return. If the text has more, a random choice of them that `seed`
            decides.

    Raises:
        ValueError: if the text is shorter than one window, or a count is not positive.
    """
    check_counts(seqlen, num_samples)
    available = len(tokens) // seqlen
    if available == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, too few for one window of seqlen={seqlen}; "
            f"use a seqlen of at most {len(tokens)}, or more text"
        )
    windows = tokens[: available * seqlen].view(available, seqlen)
    if available > num_samples:
        chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:num_samples]
        windows = windows[chosen.sort().values]
    return windows


def check_counts(seqlen: int, num_samples: int) -> None:
    if seqlen < 1 or num_samples < 1:
        raise ValueError(f"seqlen and num_samples must be at least 1, got {seqlen} and {num_samples}")


def check_positions(model: Any, seqlen: int) -> None:
    """Raises ValueError if a window has more tokens than the transformers model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # some families store -1 or 1 for "no limit"
    if isinstance(positions, int) and 1 < positions < seqlen:
        raise ValueError(
            f"seqlen={seqlen} is beyond the {positions} positions of {type(model).__name__}; "
            f"use seqlen={positions} or less"
        )


def check_ids(model: Any, ids: Tensor) -> None:
    """Raises ValueError if one of the token ids has no row in the table that the transformers model reads them from."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        # it reads no tokens, or is a module of somebody's own
        return
    if not isinstance(table, nn.Embedding) or not ids.numel():
        return
    wrong = next((each for each in (int(ids.min()), int(ids.max())) if not 0 <= each < table.num_embeddings), None)
    if wrong is not None:
        raise ValueError(
            f"token id {wrong} is beyond the vocabulary of {table.num_embeddings} of {type(model).__name__}: "
            "is this the tokenizer of this model?"
        )


def windows_of(tokenizer: Tokenizer, documents: list[str], seqlen: int, num_samples: int, seed: int = 0) -> Tensor:
    """Windows as of `sample_windows`, of a text of which only as much is tokenised as they need.

    A text of fewer than 8 characters for each token asked for is tokenised whole. A longer one is cut into pieces of 8
    characters for each token of a window; each piece of a random choice gives the window that it begins with.
    """
    check_counts(seqlen, num_samples)
    text = "\n\n".join(documents)
    size = CHARACTERS_PER_TOKEN * seqlen
    found: dict[int, Tensor] = {}
    pieces = len(text) // size
    if pieces >= num_samples:
        for piece in torch.randperm(pieces, generator=torch.Generator().manual_seed(seed)).tolist():
            ids = tokenizer(piece_of(text, piece * size, size), verbose=False, add_special_tokens=False)["input_ids"]
            # long words or runs of blanks may leave a piece too short
            if len(ids) >= seqlen:
                found[piece] = torch.tensor(ids[:seqlen], dtype=torch.long)
            if len(found) == num_samples:
                return torch.stack([found[key] for key in sorted(found)])
    return sample_windows(tokenize(tokenizer, documents), seqlen, num_samples, seed)


def piece_of(text: str, start: int, size: int) -> str:
    """The characters from `start` on that a piece has, without the word that `start` may stand in."""
    piece = text[start : start + size]
    blank = re.search(r"\s", piece[:LONGEST_WORD]) if start else None
    return piece[blank.start() :] if blank else piece
