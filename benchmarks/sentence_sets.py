"""Sentences of texts as an encoder reads them, their embeddings, and a training on them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from protocol import sha256_of
from rates import best_rate
from torch import Tensor, nn

from hf_blr.finetune import refine
from hf_blr.modes import evaluating

BATCH = 64
#: words of a sentence that is scored
FEWEST_WORDS, MOST_WORDS = 5, 60
#: steps that are enough to tell learning rates from each other
TRIAL_STEPS = 400


def sentences_of(text: str) -> list[str]:
    """The sentences of a text: what stands on a line up to a full stop, question or exclamation mark."""
    found = (part.strip() for line in text.splitlines() for part in re.split(r"(?<=[.!?])\s+", line))
    return [part for part in found if FEWEST_WORDS <= len(part.split()) <= MOST_WORDS]


def drawn_sentences(texts: Iterable[str], seed: int, held_out: int = 0) -> tuple[list[str], list[str]]:
    """(Sentences of all texts in an order that a seed draws, those that are held out of them).

    Raises:
        ValueError: if no sentence is left.
    """
    sentences = [sentence for text in texts for sentence in sentences_of(text)]
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(seed)).tolist()
    if held_out >= len(order):
        raise ValueError(f"the parts have {len(order)} sentences, of which {held_out} are to be held out")
    kept = [sentences[i] for i in order[: len(order) - held_out]]
    left_out = [sentences[i] for i in order[len(order) - held_out :]]
    # what is said twice is held out of both
    seen = set(left_out)
    return [sentence for sentence in kept if sentence not in seen], left_out


def sentence_batches(
    sentences: list[str], tokenizer: Any, names: Iterable[str], seed: int, size: int = BATCH
) -> tuple[list[dict[str, Tensor]], dict]:
    """Sentences of the named texts as the encoder reads them, and what a row says of them."""
    # of like length together, so that little is padding
    ordered = sorted(sentences, key=len)
    batches = [
        dict(tokenizer(ordered[i : i + size], padding=True, truncation=True, return_tensors="pt"))
        for i in range(0, len(ordered), size)
    ]
    ids = torch.cat([batch["input_ids"][batch["attention_mask"].bool()] for batch in batches])
    return batches, {
        "calibration": f"sentences of {', '.join(names)}",
        "calibration_tokens": len(ids),
        "calibration_sha256": sha256_of(ids),
        "seed": seed,
    }


@torch.no_grad()
def embeddings(model: nn.Module, tokenizer: Any, sentences: list[str]) -> Tensor:
    """The mean of the last hidden states of each sentence, special tokens included, at length one: `[n, hidden]`."""
    device = next(model.parameters()).device
    parts = []
    with evaluating(model):
        for start in range(0, len(sentences), BATCH):
            batch = tokenizer(sentences[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
            batch = batch.to(device)
            counted = batch["attention_mask"].unsqueeze(-1).float()
            hidden = model(**batch).last_hidden_state.float()
            parts.append((hidden * counted).sum(1) / counted.sum(1))
    return nn.functional.normalize(torch.cat(parts), dim=-1)


@dataclass
class SentenceTraining:
    """Refines on sentences, at the best of several learning rates by sentences that are held out.

    names: of the texts that the sentences are of.
    batch: sentences of a step.
    """

    dense: nn.Module
    tokenizer: Any
    sentences: list[str]
    left_out: list[str]
    names: list[str]
    seed: int
    batch: int
    #: {fit: the rate that is best for it, and what its rows say of the choice}
    chosen: dict[Any, tuple[float, dict]] = field(default_factory=dict)

    @cached_property
    def read(self) -> tuple[list[dict[str, Tensor]], dict]:
        return sentence_batches(self.sentences, self.tokenizer, self.names, self.seed, self.batch)

    @cached_property
    def wanted(self) -> Tensor:
        return embeddings(self.dense, self.tokenizer, self.left_out)

    def tokens(self, epochs: int) -> int:
        return epochs * self.read[1]["calibration_tokens"]

    def train(self, model: nn.Module, rate: float, batches: list[dict[str, Tensor]], epochs: int) -> None:
        refine(model, self.dense, batches, epochs=epochs, learning_rate=rate, seed=self.seed)

    def distance(self, model: nn.Module) -> float:
        """One less the mean cosine to the dense model's embeddings of what is held out."""
        return 1 - (embeddings(model, self.tokenizer, self.left_out) * self.wanted).sum(-1).mean().item()

    def refined(self, fit: Any, model: nn.Module, rates: list[float], epochs: int) -> dict:
        """Trains the model in place; what a row says of that.

        fit: which one the model is; several rates are tried for some steps on each.
        """
        batches = self.read[0]
        # every so many, as they stand in the order of their lengths
        some = batches[:: -(-len(batches) // TRIAL_STEPS)]

        def attempt(copied: nn.Module, rate: float) -> None:
            self.train(copied, rate, some, epochs=1)

        if fit not in self.chosen:
            several = len(rates) > 1
            self.chosen[fit] = best_rate(model, rates, attempt, self.distance) if several else (rates[0], {})
        rate, choice = self.chosen[fit]
        judged = (
            {"held_out": len(self.left_out), "held_out_distance_before": self.distance(model)} if self.left_out else {}
        )
        self.train(model, rate, batches, epochs)
        if self.left_out:
            judged["held_out_distance"] = self.distance(model)
        return {
            "finetune_sha256": self.read[1]["calibration_sha256"],
            "epochs": epochs,
            "batch": self.batch,
            "learning_rate": rate,
            **choice,
            **judged,
        }
