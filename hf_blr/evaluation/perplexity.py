"""Token perplexity of causal language models, dense or compressed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from hf_blr.config.texts import describe
from hf_blr.evaluation.scorable import check_causal, check_counts
from hf_blr.evaluation.score import Perplexity
from hf_blr.evaluation.windows import batch_windows, cut_windows
from hf_blr.modes import evaluating
from hf_blr.text import NAMED, Tokenizer, load_text, tokenize
from hf_blr.text.windows import check_ids, check_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: tokens in one forward where the caller names no batch size: the logits, not the weights, are what fills
#: memory
TOKENS_PER_BATCH = 4096
#: logits turned to float32 at a time (64 MiB)
LOGITS_PER_CHUNK = 1 << 24


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dataset: Any = "wikitext2",
    *,
    seqlen: int = 2048,
    stride: int | None = None,
    batch_size: int | None = None,
    max_windows: int | None = None,
    progress: bool = False,
) -> Perplexity:
    """Token perplexity of a causal language model.

    By default as the compression papers count it (GPTQ, SVD-LLM): the raw text joined by two newlines and
    tokenised once, cut into windows that do not overlap, the tail dropped; each window scores all of its
    tokens but the first.

    With a `stride` below `seqlen`, as the Transformers document "Perplexity of fixed-length models" does:
    windows start every `stride` tokens and each token but the text's first is scored exactly once, in the
    first window that holds it, with up to `seqlen` - 1 tokens before it; the last window may be shorter and
    nothing is dropped. The number is lower and takes `seqlen / stride` times the work.

    Args:
        model: any causal language model of Transformers. Scored in evaluation mode and left as it was.
        tokenizer: its tokenizer; not used, and may be None, where token ids are given.
        dataset: token ids `[T]` or `[1, T]`; a string with a line break in it (the text itself); or what
            `hf_blr.text.load_text` takes, of which the test split is used.
        seqlen: tokens in a window.
        stride: tokens between the starts of two windows; None is `seqlen`.
        batch_size: windows in one forward; None is as many as make 4096 tokens, at least one.
        max_windows: score only the first windows of the text.
        progress: show a progress bar.

    Returns:
        A `Perplexity`. Logits that are not finite make it inf or nan; they are never skipped.

    Raises:
        ValueError: if the text is too short, `seqlen` is beyond the model's positions, a token id is beyond
            its vocabulary, or a count is out of range. Also what `load_text` raises.
        TypeError: if the model or the tokenizer is given by its name, or the model is an encoder, an encoder-decoder or
            a classifier: it predicts no next token of its input.
    """
    check_causal(model)
    stride = seqlen if stride is None else stride
    check_counts(model, seqlen, stride, batch_size, max_windows)
    tokens, described = as_tokens(tokenizer, dataset)
    check_ids(model, tokens)
    windows = cut_windows(len(tokens), seqlen, stride)[:max_windows]
    batch_size = batch_size or max(1, TOKENS_PER_BATCH // seqlen)
    tokens = tokens.to(model.device)

    nll_sum = 0.0
    start = time.perf_counter()
    with evaluating(model), torch.no_grad():
        for batch in tqdm(batch_windows(windows, batch_size), desc="perplexity", disable=not progress):
            input_ids = torch.stack([tokens[window.begin : window.end] for window in batch])
            logits = model(input_ids=input_ids, use_cache=False).logits
            for window, window_logits in zip(batch, logits, strict=True):
                # the logits at position t - 1 predict token t
                predicting = window_logits[window.first - window.begin - 1 : -1]
                nll_sum += negative_log_likelihood(predicting, tokens[window.first : window.end])
    seconds = time.perf_counter() - start
    bos = getattr(tokenizer, "bos_token_id", None)
    return Perplexity(
        nll_sum=nll_sum,
        n_tokens=sum(window.end - window.first for window in windows),
        n_windows=len(windows),
        seqlen=seqlen,
        stride=stride,
        dropped_tokens=len(tokens) - windows[-1].end,
        dataset=described,
        tokenizer=None if isinstance(dataset, torch.Tensor) or tokenizer is None else tokenizer.name_or_path,
        starts_with_bos=bos is not None and tokens[0].item() == bos,
        dtype=str(model.dtype).removeprefix("torch."),
        seconds=seconds,
    )


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The sum over the tokens `[T]`, from logits `[T, vocabulary]` turned to float32 a few rows at a time."""
    rows = max(1, LOGITS_PER_CHUNK // logits.shape[-1])
    total = 0.0
    for part, target in zip(logits.split(rows), targets.to(logits.device).split(rows), strict=True):
        # summed on the CPU because some accelerators have no float64
        total += F.cross_entropy(part.float(), target, reduction="none").cpu().double().sum().item()
    return total


def as_tokens(tokenizer: Tokenizer | None, dataset: Any) -> tuple[torch.Tensor, str]:
    """The ids `[T]` and a description of what `perplexity` was given."""
    if isinstance(dataset, torch.Tensor):
        if dataset.dim() == 2 and dataset.shape[0] == 1:
            dataset = dataset[0]
        if dataset.dim() != 1 or dataset.is_floating_point():
            raise ValueError(
                f"token ids must be integers of shape [T] or [1, T], got {dataset.dtype} of {list(dataset.shape)}"
            )
        return dataset.long(), f"<{len(dataset)} token ids>"
    if tokenizer is None:
        raise ValueError("a tokenizer is needed unless the dataset is a tensor of token ids: give the model's own")
    check_tokenizer(tokenizer)
    if isinstance(dataset, str) and "\n" in dataset:
        return tokenize(tokenizer, [dataset]), f"<text of {len(dataset)} characters>"
    named = isinstance(dataset, str) and dataset in NAMED
    return tokenize(tokenizer, load_text(dataset, "test", tokenizer)), describe(dataset) + (" (test)" if named else "")
