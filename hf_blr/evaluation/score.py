"""A perplexity with what must be known to compare it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and the protocol behind it.

    Attributes:
        nll_sum: the sum of the scored tokens' negative log-likelihoods, in nats.
        n_tokens: tokens scored.
        n_windows: windows that went through the model.
        seqlen: tokens in a window.
        stride: tokens between the starts of two windows; equal to `seqlen` where windows do not overlap.
        dropped_tokens: tokens of the text in no window: the tail, and what `max_windows` left out.
        dataset: what was scored.
        tokenizer: its name or path; None where token ids were given.
        starts_with_bos: whether the text opens with a beginning-of-sequence token; only the first window has
            one.
        dtype: of the model's parameters. Losses are computed in float32 and summed in float64.
        seconds: wall time of the scoring; loading and tokenising are not in it.
    """

    nll_sum: float
    n_tokens: int
    n_windows: int
    seqlen: int
    stride: int
    dropped_tokens: int
    dataset: str
    tokenizer: str | None
    starts_with_bos: bool
    dtype: str
    seconds: float

    @property
    def ppl(self) -> float:
        """exp(mean negative log-likelihood per scored token); inf or nan where the model gave such logits."""
        mean = self.nll_sum / self.n_tokens
        # beyond the largest double, where exp raises instead of returning inf
        return math.inf if mean > 709 else math.exp(mean)

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second."""
        return self.n_tokens / self.seconds

    @property
    def protocol(self) -> str:
        """One line that says how the number was counted."""
        overlap = "without overlap" if self.stride == self.seqlen else f"every {self.stride} tokens"
        bos = "BOS at the start of the text" if self.starts_with_bos else "no BOS"
        tokenizer = f", tokenizer {self.tokenizer}" if self.tokenizer else ""
        return (
            f"token perplexity of {self.dataset}{tokenizer}: {self.n_tokens} tokens scored in "
            f"{self.n_windows} windows of {self.seqlen} {overlap}, {self.dropped_tokens} tokens dropped, "
            f"{bos}, {self.dtype} model"
        )

    def __str__(self) -> str:
        return f"perplexity {self.ppl:.2f} ({self.protocol})"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, with `ppl`, `tokens_per_second` and `protocol` worked out."""
        worked_out = {"tokens_per_second": self.tokens_per_second, "protocol": self.protocol}
        return {"ppl": self.ppl, **asdict(self), **worked_out}
