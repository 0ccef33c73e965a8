"""What `hf-blr demo` measures: one row for the dense model and for each way to compress it."""

from __future__ import annotations

import argparse
import copy
import time
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_blr.calibration import collect_statistics
from hf_blr.calibration.batches import TOKENS_PER_FORWARD
from hf_blr.cli.demo import QUICK_SHARE, QUICK_STRIDE, SAVED
from hf_blr.compression import compress
from hf_blr.config import BLRConfig
from hf_blr.config.texts import DEFAULT_WITHOUT_WRITING, describe
from hf_blr.evaluation import perplexity
from hf_blr.finetune import refine
from hf_blr.linear import blr_modules
from hf_blr.plan import resolve_plan
from hf_blr.text import load_text, load_windows, resolve_dataset, tokenize

Row = dict[str, Any]

#: windows in a batch of the fits on a CPU, whose cache more would not fit into; a GPU waits for launches, and
#: gets the batches that `compress` makes
BATCH = 4
#: windows in a step of the refinement, and the rate. It has so little text that codes would fit that, and trains scales
STEP, RATE, TRAINED = 2, 1e-3, "scales"


class Demo:
    """One run: the dense model, what it is fitted to, and the two texts that are scored.

    Raises:
        ValueError: if there is too little text to fit to some and score other.
    """

    def __init__(self, args: argparse.Namespace, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.args, self.dense = args, dense.eval()
        self.name = Path(args.gguf_file or args.model).name.partition(".Q")[0]
        # what the saved tokenizer calls it, rather than a folder of this machine
        tokenizer.name_or_path = self.name
        self.dataset = describe(resolve_dataset(args.dataset, dense))
        fitted, scored = (self.windows(tokens) for tokens in (args.calibration_tokens, args.evaluation_tokens))
        windows = load_windows(args.dataset, dense, tokenizer, args.seqlen, fitted + scored)
        if len(windows) < 2:
            raise ValueError(
                f"{self.dataset} has one window of {args.seqlen} tokens, and a part is to be scored that is not fitted "
                "to: give more text or a smaller --seqlen"
            )
        held_out = min(scored, len(windows) // 2)
        self.calibration = windows[:-held_out]
        unseen = tokenize(tokenizer, load_text(DEFAULT_WITHOUT_WRITING, "test", tokenizer))
        self.texts = {
            "perplexity, own text": windows[-held_out:].flatten(),
            "perplexity, unseen text": unseen[: scored * args.seqlen],
        }
        self.layers = range(0, dense.config.num_hidden_layers, QUICK_STRIDE if args.quick else 1)
        plan = resolve_plan(dense, self.config("low_rank", ratio=args.ratio))
        self.numbers = sum(layer.spec.dense_parameters for layer in plan.values())

    def windows(self, tokens: int) -> int:
        return max(1, tokens // (self.args.seqlen * (QUICK_SHARE if self.args.quick else 1)))

    def config(self, structure: str, **size: Any) -> BLRConfig:
        numbers = "|".join(map(str, self.layers))
        # the digits are those of the block in which a projection stands
        chosen = rf".*\.({numbers})\.(\w+\.)*\w*proj" if self.args.quick else None
        return BLRConfig(structure, target_modules=chosen, fit_rounds=self.args.rounds, fit_tolerance=0.01, **size)

    def compare(self) -> tuple[list[Row], PreTrainedModel]:
        """Rows for the dense model and each way, and the last model. All share one run for the statistics."""
        args, rows = self.args, [self.row("dense", self.dense)]
        percent = f"{100 * args.ratio:.0f} %"
        ways = {
            f"low-rank, {percent}": self.config("low_rank", ratio=args.ratio),
            f"BLAST, {percent}": self.config("blast", ratio=args.ratio),
            f"auto, {args.bits:g} bits": self.config("auto", bits_per_weight=args.bits, group_size=args.group_size),
        }
        print(f"reading {self.calibration.numel()} tokens to fit to ...", flush=True)
        started = time.perf_counter()
        together = BATCH if self.dense.device.type == "cpu" else max(1, TOKENS_PER_FORWARD // args.seqlen)
        batches = [batch.to(self.dense.device) for batch in self.calibration.split(together)]
        statistics = collect_statistics(self.dense, self.config("low_rank", ratio=args.ratio), calibration=batches)
        self.statistics_seconds = time.perf_counter() - started
        for name, config in ways.items():
            print(f"fitting {name} ...", flush=True)
            model = copy.deepcopy(self.dense)
            report = compress(model, config, calibration=batches, statistics=statistics)
            rows.append(self.row(name, model, report.seconds))
        self.taken = Counter(layer.choice.taken for layer in report.layers if layer.choice)
        return rows, model

    def refined(self, model: PreTrainedModel) -> Row:
        """Refines the model, with the dense one as teacher, and measures it again."""
        print(f"refining it on {self.args.epochs * self.calibration.numel()} tokens ...", flush=True)
        started = time.perf_counter()
        settings = {"epochs": self.args.epochs, "batch_size": STEP, "learning_rate": RATE, "bits": TRAINED}
        refine(model, self.dense, self.calibration, **settings)
        return self.row("the same, refined", model, time.perf_counter() - started)

    def row(self, name: str, model: PreTrainedModel, seconds: float | None = None) -> Row:
        scores = {text: perplexity(model, None, ids, seqlen=self.args.seqlen) for text, ids in self.texts.items()}
        found = {text: score.ppl for text, score in scores.items()}
        print(f"{name}: {', '.join(f'{text} {ppl:.2f}' for text, ppl in found.items())}", flush=True)
        size, dense = saved_bytes(model), saved_bytes(self.dense)
        return {
            "model": name,
            "bits a weight": 8 * (SAVED.itemsize - (dense - size) / self.numbers),
            "MB": size / 1e6,
            **found,
            "tokens/s": scores["perplexity, unseen text"].tokens_per_second,
            "seconds": seconds,
        }

    def conditions(self) -> str:
        """What the table's numbers are worth, in a few lines."""
        all_layers, args = self.dense.config.num_hidden_layers, self.args
        layers = f"{len(self.layers)} of {all_layers}" if args.quick else f"all {all_layers}"
        taken = ", ".join(f"{count} {name}" for name, count in self.taken.most_common())
        own, unseen = (len(ids) for ids in self.texts.values())
        return (
            f"{self.name}: {layers} decoder layers compressed, in {args.dtype}, fitted to {self.calibration.numel()} "
            f"tokens of {self.dataset}, whose pass through the dense model and back took {self.statistics_seconds:.0f} "
            f"s more. Own text: {own} further tokens of it; unseen: {unseen} of {DEFAULT_WITHOUT_WRITING}'s test "
            f"part, in windows of {args.seqlen}, no BOS. Tokens a second are those of scoring. Bits count all that the "
            f"compressed projections store, MB the whole file in bfloat16. Within the budget of bits the layers took: "
            f"{taken}."
        )


def saved_bytes(model: PreTrainedModel) -> int:
    """Of a file of the model in the dtype in which it is saved; what is kept in bits has dtypes of its own."""
    indices = [index for layer in blr_modules(model).values() for index in layer.indices().values()]
    stored = [*model.parameters(), *indices]
    return sum(t.numel() * (SAVED if t.dtype == model.dtype else t.dtype).itemsize for t in stored)
