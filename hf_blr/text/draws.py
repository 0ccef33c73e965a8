"""Drawing tokens so that rows share no more of their beginnings than the model's distribution demands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: tokens that are summed together before one of them is looked for
CHUNK = 256


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
        shared = self.width * self.all_rows > 1
        points = torch.where(shared, self.codes, self.noise[:, self.step])[:, None]
        tokens, lower, upper = drawn(scores.softmax(-1, dtype=torch.float32), points)
        self.codes = ((points - lower) / (upper - lower))[:, 0]
        # not a number once a logit was none, and from then on
        self.width = self.width * (upper - lower)[:, 0]
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0.0)


def drawn(probabilities: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the first token whose cumulative probability lies above the point, where its interval begins, where it ends).

    Sums of chunks say in which chunk the token is, so that only one chunk is summed up token by token: a running sum
    over all of a large vocabulary takes a GPU longer than the model does.

    Args:
        probabilities: `[B, V]`, float32; they need not add up to one.
        points: in [0, 1), `[B, 1]`, float64.

    Returns:
        Three tensors `[B, 1]`, int64 and float64.
    """
    chunks = F.pad(probabilities, (0, -probabilities.shape[-1] % CHUNK)).unflatten(-1, (-1, CHUNK))
    ends = chunks.sum(-1, dtype=torch.float64).cumsum(-1)
    points = points * ends[:, -1:]
    chunk = first_above(ends, points)
    before = torch.where(chunk > 0, ends.gather(-1, (chunk - 1).clamp(min=0)), 0.0)
    cumulative = before + chunks.take_along_dim(chunk[..., None], 1)[:, 0].cumsum(-1, dtype=torch.float64)
    place = first_above(cumulative, points)
    lower = torch.where(place > 0, cumulative.gather(-1, (place - 1).clamp(min=0)), before)
    upper = cumulative.gather(-1, place)
    # beyond the vocabulary only where sums are no numbers
    tokens = (chunk * CHUNK + place).clamp(max=probabilities.shape[-1] - 1)
    return tokens, lower / ends[:, -1:], upper / ends[:, -1:]


def first_above(cumulative: Tensor, points: Tensor) -> Tensor:
    """The index of the first sum above the point; where rounding leaves none, of the first that is as large as any."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    found = torch.searchsorted(cumulative, points, right=True).minimum(last)
    # of sums that are no numbers there is none
    return found.clamp(max=cumulative.shape[-1] - 1)
