"""Drawing tokens so that rows share no more of their beginnings than the model's distribution demands."""

from __future__ import annotations

import torch
from torch import Tensor


class Codes:
    """Random numbers for `rows` sequences: a code for each, one n-th apart from the next, and noise for each token.

    Whoever draws by codes sees each beginning as often as its probability says, rounded up or down: that is systematic
    sampling, carried on from token to token as in arithmetic sampling (arXiv 2210.15458). They come from a generator on
    the CPU, so that neither the device nor the size of a batch decides what is drawn.
    """

    def __init__(self, rows: int, steps: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.rows = rows
        # in a random order, so that each part of the rows is spread like all of them
        self.codes = (
            torch.randperm(rows, generator=generator) + torch.rand(1, generator=generator, dtype=torch.float64)
        ) / rows
        self.noise = torch.rand(rows, steps, generator=generator, dtype=torch.float64)


class Draws:
    """A logits processor of transformers that leaves one token a row, drawn from the softmax of the logits.

    A row's `width` is the probability of what it has drawn. Above 1/n other rows may have drawn the same, and its code,
    read anew within the interval that the last token left, decides the next token; below that the row is alone, and
    fresh noise decides. Each row by itself is an exact sample at temperature 1.

    Args:
        codes: for all rows.
        rows: which of them this batch holds, `[B]`.
        device: of the logits.
    """

    def __init__(self, codes: Codes, rows: Tensor, device: torch.device):
        self.all_rows = codes.rows
        self.codes = codes.codes[rows].to(device)
        self.noise = codes.noise[rows].to(device)
        self.width = torch.ones_like(self.codes)
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative = scores.softmax(-1, dtype=torch.float32).cumsum(-1, dtype=torch.float64)
        cumulative = cumulative / cumulative[:, -1:]
        shared = self.width * self.all_rows > 1
        points = torch.where(shared, self.codes, self.noise[:, self.step])[:, None]
        # the first token whose cumulative probability lies above the point
        tokens = torch.searchsorted(cumulative, points, right=True).clamp(max=scores.shape[-1] - 1)
        upper = cumulative.gather(-1, tokens)
        lower = torch.where(tokens > 0, cumulative.gather(-1, (tokens - 1).clamp(min=0)), 0.0)
        self.codes = ((points - lower) / (upper - lower))[:, 0]
        # not a number once a logit was none, and from then on
        self.width = self.width * (upper - lower)[:, 0]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0.0)
