"""Text that a causal language model writes itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_blr.inference.replayed import can_replay, replayed_steps
from hf_blr.modes import evaluating
from hf_blr.text.draws import Codes, Draws
from hf_blr.text.openings import beginnings_for
from hf_blr.text.windows import check_positions

#: for keys and values of a batch where the device does not say how much it has; more rows gain nothing on a CPU
CACHE_BYTES = 2 << 30
#: for each logit of a row: itself, twice in float32, its probability, that in whole chunks, what is left of it
BYTES_PER_LOGIT = 24
#: of the keys and values of a batch: up to here a step takes longer to launch than to attend to a full cache
REPLAYED_BYTES = 1 << 30


def can_write(model: Any) -> bool:
    """Whether the model predicts the next token of its own input, so that it can go on by itself."""
    can_generate = getattr(model, "can_generate", None)
    return can_generate is not None and can_generate() and not model.config.is_encoder_decoder


def write_windows(
    model: Any,
    tokenizer: Any,
    num_samples: int,
    seqlen: int,
    seed: int = 0,
    *,
    chat: bool = False,
    beginnings: Tensor | None = None,
    progress: bool = True,
) -> Tensor:
    """Windows of text that the model writes by sampling from its own predictions at temperature 1.

    Each window begins with an empty document, unless it is told otherwise. A document that ends is followed by the
    next, as in pretraining. Models that compute on such text meet what they meet when they are used, without any text
    from elsewhere (LLM-QAT, arXiv 2305.17888).

    Args:
        model: a causal language model of transformers, on any device and in any dtype. Left as it was.
        tokenizer: of the model; says which token begins a document, and has the chat template.
        num_samples: windows.
        seqlen: tokens in a window, those that it begins with included.
        seed: the same seed gives the same windows; PyTorch's own generators are neither used nor changed. Kernels that
            round differently (another device, dtype or batch) may change a token, and then all after it.
        chat: each window begins with the opening of a user's turn in the tokenizer's chat template, and the model
            writes the turns (Magpie, arXiv 2406.08464).
        beginnings: token ids `[m, b]` of some text, with which the windows begin in turn; the model goes on. A little
            text of a kind becomes a lot of it that way. None: with an empty document.
        progress: show a progress bar.

    Returns:
        Token ids `[num_samples, seqlen]`, int64, on the CPU. `refine`, `WindowDataset` and, split into batches,
        `compress(calibration=...)` take them.

    Raises:
        ValueError: if the model is no causal language model, nothing says which token begins a document, there is no
            chat template to begin with, beginnings are no token ids of it or come with a chat, windows have no room for
            the model's own tokens or more tokens than it has positions, or its logits are not finite.
    """
    if not can_write(model):
        raise ValueError(
            f"{type(model).__name__} cannot write text: only causal language models do. Name a text instead, "
            '"builtin", "wikitext2" or a file'
        )
    beginnings = beginnings_for(model, tokenizer, chat, beginnings)
    begun = beginnings.shape[1]
    if num_samples < 1 or seqlen <= begun:
        raise ValueError(
            f"num_samples must be at least 1 and seqlen more than the {begun} tokens that a window begins with, "
            f"got {num_samples} and {seqlen}"
        )
    check_positions(model, seqlen)
    codes = Codes(num_samples, seqlen - begun, seed)
    windows = []
    bar = tqdm(total=num_samples * codes.noise.shape[1], desc="writing text", unit="token", disable=not progress)
    with bar, evaluating(model), plain_generation(model, seqlen - begun) as settings:
        for rows in torch.arange(num_samples).split(rows_at_once(model, seqlen)):
            draws = Draws(codes, rows, model.device)

            def draw(input_ids: Tensor, scores: Tensor, draws: Draws = draws) -> Tensor:
                bar.update(len(scores))
                return draws(input_ids, scores)

            ids = beginnings[rows % len(beginnings)].to(model.device)
            mask = torch.ones_like(ids)
            with steps_of(model, len(rows), seqlen) as cache:
                written = model.generate(
                    ids, attention_mask=mask, generation_config=settings, logits_processor=[draw], **cache
                )
            if draws.width.isnan().any():
                raise ValueError(
                    f"{type(model).__name__} gives logits that are not finite; load it in bfloat16 or float32"
                )
            windows.append(written.cpu())
    return torch.cat(windows)


def steps_of(model: Any, rows: int, seqlen: int) -> AbstractContextManager[dict[str, Any]]:
    """A context in which `generate()` replays its steps where that is faster; yields what to hand it besides."""
    small = rows * cache_bytes(model, seqlen) <= REPLAYED_BYTES
    return replayed_steps(model, seqlen) if small and can_replay(model) else nullcontext({})


@contextmanager
def plain_generation(model: Any, new_tokens: int) -> Iterator[Any]:
    """For a while the model generates without any setting of its own: no temperature, no penalty, no stopping."""
    kept = model.generation_config
    # what a config leaves out, `generate` fills in from the model's; draws make the choice of the largest a sample
    model.generation_config = type(kept)(max_new_tokens=new_tokens, do_sample=False, use_cache=True)
    try:
        yield model.generation_config
    finally:
        model.generation_config = kept


def cache_bytes(model: Any, seqlen: int) -> int:
    """What the keys and values of a window take."""
    config = model.config.get_text_config()
    heads, all_heads = (getattr(config, f"num_{kind}heads", None) for kind in ("key_value_", "attention_"))
    width = getattr(config, "head_dim", None) or (config.hidden_size // all_heads if all_heads else None)
    # families without heads keep a state that is smaller than this
    values = (heads or all_heads) * width if width and all_heads else config.hidden_size
    return 2 * config.num_hidden_layers * values * model.dtype.itemsize * seqlen


def rows_at_once(model: Any, seqlen: int) -> int:
    """How many windows are written together, by the memory of their keys and values."""
    row = cache_bytes(model, seqlen) + BYTES_PER_LOGIT * model.config.get_text_config().vocab_size
    budget = CACHE_BYTES
    if model.device.type == "cuda":
        weights = sum(parameter.nbytes for parameter in model.parameters())
        # of all that is left and not of what is free: the same batches in each run
        budget = (torch.cuda.get_device_properties(model.device).total_memory - weights) // 2
    return max(1, budget // row)
