"""One protocol for all methods: the model, the texts that are scored, and what a row says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_blr.compression import parameter_sizes
from hf_blr.config import BLRConfig
from hf_blr.dense import is_dense_linear, stored_weight
from hf_blr.evaluation import perplexity
from hf_blr.ops import use_impl
from hf_blr.plan import resolve_plan

SEQLEN = 2048
#: calibration windows, and how many run at once; sequential fits want batches of one shape
WINDOWS, BATCH = 128, 8
#: WikiText-2 as distributed is tokenised; these marks stand for characters inside words and numbers
MARKS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}
#: what sizes are counted in, but for what a format stores in bits
DTYPE = torch.bfloat16
TURNED = "turned"
PROTOCOL = (
    "token perplexity on non-overlapping windows of 2048 of each whole text, no BOS, WikiText-2's marks undone; "
    "float32 weights, TF32 products on a GPU in scoring, float32 in fits; every row names the windows of 2048 that it "
    "was fitted to; bytes in bfloat16; bits a weight are all that is stored for the targeted projections over their "
    f"dense numbers; of a model that is called {TURNED}, the residual stream stands in another, random orthogonal "
    "basis, in which weights lie on no grid of the file that they come from, and the head is stored apart from the "
    "embedding"
)
#: by how much a model may keep more than it says; counts are whole ranks and units
SIZE_TOLERANCE = 0.005


@dataclass
class Bench:
    """The dense model and the texts that are scored.

    texts: {dataset: token ids `[tokens]`}; what fills no window is cut off.

    Raises:
        ValueError: if a text has less than one window.
    """

    name: str
    dense: nn.Module
    texts: dict[str, Tensor]

    def __post_init__(self):
        for name, ids in self.texts.items():
            if len(ids) < SEQLEN:
                raise ValueError(f"the text {name!r} needs {SEQLEN} tokens at least, got {len(ids)}")
        self.texts = {name: ids[: len(ids) // SEQLEN * SEQLEN] for name, ids in self.texts.items()}
        plan = resolve_plan(self.dense, BLRConfig(ratio=0.5))
        self.targets = {name: layer.spec.dense_parameters for name, layer in plan.items()}
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
                }
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    def rows(self, model: nn.Module, facts: dict, kept: int | None = None, stored: int | None = None) -> list[dict]:
        """One row for each dataset.

        Args:
            model: to score.
            facts: what the row says of it: method, ratio, fit_seconds and so on.
            kept: numbers that the targeted projections need, of a model whose zeros stand for what is gone; counted
                if left out.
            stored: bytes that they take, of a model that stands for one of another library's; counted if left out.

        Raises:
            ValueError: if the targeted projections keep more than the ratio that the row would claim, or more bits.
        """
        scores = self.dense_ppl if model is self.dense else self.score(model)
        if stored is None:
            stored = stored_bytes(model, self.targets) if kept is None else DTYPE.itemsize * kept
        kept = kept_parameters(model, self.targets) if kept is None else kept
        total = sum(self.targets.values())
        if kept > (facts["ratio"] + SIZE_TOLERANCE) * total:
            raise ValueError(f"{facts['method']} keeps {kept / total:.4f} of the projections, not {facts['ratio']:g}")
        bits, budget = 8 * stored / total, facts.get("bits_per_weight")
        if budget is not None and bits > budget:
            raise ValueError(f"{facts['method']} stores {bits:.4f} bits a weight, not {budget:g}")
        rest = parameter_sizes(self.dense)[0] - total
        shared = {
            "model": self.name,
            "structure": None,
            "blocks": None,
            **facts,
            "kept": kept / total,
            "bits": bits,
            "parameters": rest + kept,
            "bytes": facts.get("bytes", DTYPE.itemsize * rest + stored),
        }
        return [
            {
                **shared,
                "dataset": dataset,
                "ppl": ppl,
                "dense_ppl": self.dense_ppl[dataset],
                "text_tokens": len(self.texts[dataset]),
                "text_sha256": sha256_of(self.texts[dataset]),
            }
            for dataset, ppl in scores.items()
        ]


def kept_parameters(model: nn.Module, targets: Iterable[str]) -> int:
    """The numbers in the matrices, factors and indices of the targeted projections; biases are not counted."""
    modules = [model.get_submodule(name) for name in targets]
    return sum(stored_weight(m).numel() if is_dense_linear(m) else m.spec.num_parameters for m in modules)


def stored_bytes(model: nn.Module, targets: Iterable[str]) -> int:
    """What the targeted projections take in a file: codes, scales, indices, and numbers in `DTYPE`; no biases."""
    modules = [model.get_submodule(name) for name in targets]
    return sum(
        DTYPE.itemsize * stored_weight(m).numel() if is_dense_linear(m) else m.storage.num_bytes(m.spec, DTYPE)
        for m in modules
    )


def sha256_of(ids: Tensor) -> str:
    """Of token ids, whatever their shape and integer type, as int32 in little-endian order."""
    return hashlib.sha256(ids.to("cpu", torch.int32).contiguous().numpy().astype("<i4").tobytes()).hexdigest()


def check_tokens(rows: list[dict]) -> None:
    """Raises ValueError if one name stands for different tokens: rows on them would not be comparable.

    Rows that do not say which tokens they are of are passed over.
    """
    known: dict[tuple, str] = {}
    for row in rows:
        scored = ("text", row["model"], row.get("dataset")), row.get("text_sha256")
        fitted = tuple(row.get(name) for name in ("model", "calibration", "calibration_tokens", "seed"))
        for name, tokens in (scored, (("calibration", *fitted), row.get("calibration_sha256"))):
            if tokens is not None and known.setdefault(name, tokens) != tokens:
                raise ValueError(
                    f"{' '.join(map(str, name))} stands for two different sequences of tokens, {known[name][:12]} and "
                    f"{tokens[:12]}; rows of both do not go into one file"
                )


def read_ids(sources: list[str], tokenizer) -> dict[str, Tensor]:
    """Token ids by name.

    Args:
        sources: each NAME=FILE of a text, or a file in which `torch.save` left {name: ids}, as they are.
        tokenizer: for texts alone.
    """
    found: dict[str, Tensor] = {}
    for source in sources:
        name, is_text, path = source.partition("=")
        if is_text:
            found[name] = tokenizer(plain(Path(path)), return_tensors="pt")["input_ids"][0]
        else:
            found |= torch.load(source)
    return found


def plain(path: Path) -> str:
    """The file's text with WikiText's marks undone; other texts do not have them."""
    text = path.read_text()
    for mark, character in MARKS.items():
        text = text.replace(mark, character)
    return text
