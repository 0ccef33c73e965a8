"""One protocol for all methods: the model, the text, what is scored, and what a row says."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_blr.calibration import collect_statistics
from hf_blr.compression import parameter_sizes
from hf_blr.config import BLRConfig
from hf_blr.evaluation import perplexity
from hf_blr.ops import use_impl

SEQLEN = 2048
#: calibration windows, and how many run at once; sequential fits want batches of one shape
WINDOWS, BATCH = 128, 8
#: WikiText-2 as distributed is tokenised; these marks stand for characters inside words and numbers
MARKS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}
PROTOCOL = (
    "token perplexity on non-overlapping windows of 2048 of the whole text, no BOS, WikiText-2's marks undone; float32 "
    "weights, TF32 products on a GPU in scoring, float32 in fits; fitted to 128 windows of 2048 of WikiText-2 "
    "validation; bytes in bfloat16"
)


@dataclass
class Bench:
    """The dense model, its statistics, and the texts.

    texts: {"calibration": token ids, dataset: token ids, ...}, each `[tokens]`.
    """

    name: str
    dense: nn.Module
    texts: dict[str, Tensor]

    def __post_init__(self):
        device = next(self.dense.parameters()).device
        tokens = self.texts["calibration"]
        count = min(WINDOWS, len(tokens) // SEQLEN // BATCH * BATCH)
        if not count:
            raise ValueError(f"the calibration text needs {BATCH * SEQLEN} tokens at least, got {len(tokens)}")
        self.windows = tokens[: count * SEQLEN].view(count, SEQLEN).long()
        self.batches = [batch.to(device) for batch in self.windows.split(BATCH)]
        started = time.perf_counter()
        self.statistics = collect_statistics(self.dense, BLRConfig(ratio=0.5), calibration=self.batches)
        self.statistics_seconds = time.perf_counter() - started
        self.dense_ppl = self.score(self.dense)

    def score(self, model: nn.Module) -> dict[str, float]:
        """{dataset: perplexity}."""
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            with use_impl("dense"):
                return {
                    name: perplexity(model, None, ids, seqlen=SEQLEN, batch_size=BATCH).ppl
                    for name, ids in self.texts.items()
                    if name != "calibration"
                }
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def rows(self, model: nn.Module, method: str, ratio: float, **more) -> list[dict]:
        """One row for each dataset."""
        scores = self.dense_ppl if model is self.dense else self.score(model)
        parameters = parameter_sizes(model)[0]
        shared = {
            "model": self.name,
            "protocol": PROTOCOL,
            "structure": None,
            "blocks": None,
            "method": method,
            "ratio": ratio,
            "parameters": parameters,
            "bytes": 2 * parameters,
            "fit_seconds": 0.0,
            "calibration_tokens": 0,
            "finetune_tokens": 0,
            "mean_rel_error": None,
            **more,
        }
        return [{**shared, "dataset": d, "ppl": ppl, "dense_ppl": self.dense_ppl[d]} for d, ppl in scores.items()]


def read_texts(calibration: Path | None, evaluate: dict[str, Path], ids: Path | None, tokenizer) -> dict[str, Tensor]:
    """Token ids of the texts, from files of text or from a file that `torch.save` wrote: {name: ids `[tokens]`}."""
    if ids is not None:
        stored = torch.load(ids)
        return {"calibration" if name == "valid" else name: tokens for name, tokens in stored.items()}
    texts = {"calibration": calibration, **evaluate}
    return {name: tokenizer(plain(path), return_tensors="pt")["input_ids"][0] for name, path in texts.items()}


def plain(path: Path) -> str:
    """The file's text with WikiText's marks undone; other texts do not have them."""
    text = path.read_text()
    for mark, character in MARKS.items():
        text = text.replace(mark, character)
    return text
