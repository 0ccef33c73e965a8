"""Perplexity against size: baselines and ours on one protocol, in one process, to one file.

    python benchmarks/quality.py --model FOLDER --gguf-file NAME --calibration valid.txt \
        --evaluate wikitext2=test.txt ptb=ptb.txt

Rows are written as soon as they are measured; a row that the file holds is skipped, so a stopped run goes on. Several
processes share the rows with `--shard 1/4 --json part1.json` and so on; `merge.py` makes one file of theirs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import baselines
from protocol import PROTOCOL, Bench, read_texts

from hf_blr import BLRConfig, compress
from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import ResultFile
from hf_blr.cli import options
from hf_blr.finetune import refine
from hf_blr.plan import resolve_plan

OURS = "ours"
REFINED = "ours, refined"
BLOCK_JOINT = "ours, block-joint"
BLOCK_JOINT_REFINED = "ours, block-joint, refined"
OFF = {"sequential": False, "fisher": False, "allocation": "uniform"}
ACTIVATIONS = "activations"
RATIOS = (0.5, 0.8, 0.3, 0.9, 0.6, 0.7, 0.4)
#: what each switch gives, beside everything off and everything on
LADDER = {
    ACTIVATIONS: OFF,
    "+ Fisher": {**OFF, "fisher": True},
    "+ Fisher + shared budget": {"sequential": False},
    "+ sequential": {**OFF, "sequential": True},
}
#: steps of BLAST's own descent
DESCENT_STEPS = 100
#: gradient steps on each block by itself
BLOCK_STEPS = 64
#: twice the rounds of alternating least squares, and a later stop
MORE_ROUNDS = {"fit_rounds": 32, "fit_tolerance": 1e-3}
EPOCHS = 8


@dataclass(frozen=True)
class Run:
    """One method at one ratio; `kind` says how its model is made."""

    method: str
    structure: str
    ratio: float
    blocks: tuple[int, int] | None = None
    kind: str = "compress"
    settings: tuple = ()

    @property
    def label(self) -> str:
        blocks = "" if self.blocks is None else " {}x{}".format(*self.blocks)
        return f"{self.structure}{blocks} {self.ratio:g} {self.method}"

    @property
    def family(self) -> tuple:
        """A run that refines can go on from a fit of its family."""
        fitted = self.kind in ("compress", "refine")
        return self.structure, self.blocks, self.ratio, self.settings, fitted


def runs() -> list[Run]:
    """All of them, the most telling first; what refines a fit comes right after it."""

    def ours(structure, ratio, blocks=None, method=OURS, settings=None):
        return Run(method, structure, ratio, blocks, settings=tuple((settings or {}).items()))

    blast = [ours("blast", ratio, (4, 16)) for ratio in (0.8, 0.5)]
    refined = [Run(REFINED, run.structure, run.ratio, run.blocks, "refine") for run in blast]
    whitened = [ours("low_rank", ratio, method="whitened SVD", settings=OFF) for ratio in (0.8, 0.5)]
    low_rank = [ours("low_rank", ratio) for ratio in (0.8, 0.5)]
    pivoted = [ours("pivoted", ratio) for ratio in (0.8, 0.5)]
    by_block = {"block_steps": BLOCK_STEPS}
    joint = [
        ours(structure, ratio, blocks, BLOCK_JOINT, by_block)
        for structure, blocks in (("blast", (4, 16)), ("low_rank", None), ("blast", (16, 16)))
        for ratio in (0.8, 0.5)
    ]
    joint += [
        Run(BLOCK_JOINT_REFINED, "blast", ratio, (16, 16), "refine", tuple(by_block.items())) for ratio in (0.8, 0.5)
    ]
    ladder = [
        ours(structure, ratio, blocks, method, settings)
        for structure, blocks in (("low_rank", None), ("blast", (4, 16)))
        for ratio in (0.5, 0.8)
        for method, settings in LADDER.items()
        if (structure, method) != ("low_rank", ACTIVATIONS)
    ]
    sweep = [
        ours(structure, ratio, blocks)
        for ratio in (0.3, 0.9, 0.6, 0.7, 0.4)
        for structure, blocks in (("low_rank", None), ("pivoted", None), ("blast", (4, 16)))
    ]
    # low-rank and square BLAST at every ratio and stage
    stages = [
        run
        for ratio in RATIOS
        for structure, blocks in (("low_rank", None), ("blast", (16, 16)))
        for run in (
            ours(structure, ratio, blocks, ACTIVATIONS if blocks else "whitened SVD", OFF),
            ours(structure, ratio, blocks),
            Run(REFINED, structure, ratio, blocks, "refine"),
        )
    ]
    shapes = [
        ours(structure, ratio, blocks)
        for structure, blocks in (
            ("auto", None),
            ("monarch", (4, 4)),
            ("blast", (4, 4)),
            ("blast", (4, 32)),
            ("blast", (16, 4)),
            ("blast", (32, 32)),
        )
        for ratio in (0.5, 0.8)
    ]
    rounds = [ours("blast", ratio, (16, 16), "ours, 32 rounds", MORE_ROUNDS) for ratio in (0.5, 0.8)]
    others = [
        run
        for ratio in (0.8, 0.5)
        for run in (
            Run("plain SVD", "low_rank", ratio, kind="weights"),
            Run("SVD-LLM with update", "low_rank", ratio, kind="svd_llm"),
            Run("blockwise SVD, no activations", "monarch", ratio, (4, 4), kind="weights"),
            Run("BLAST's own descent", "blast", ratio, (16, 16), kind="descent"),
        )
    ]
    interleaved = [run for pair in zip(blast, refined, strict=True) for run in pair]
    storage = [run for first in pivoted for run in (first, Run(REFINED, first.structure, first.ratio, kind="refine"))]
    every = [
        *whitened,
        *interleaved,
        *low_rank,
        *storage,
        *joint,
        *ladder[:6],
        *others[:2],
        *shapes[:2],
        *sweep,
        *stages,
        *ladder[6:],
        *shapes[2:],
        *others[2:],
        *rounds,
    ]
    after = {run.family: run for run in every if run.kind == "refine"}
    ordered = []
    for run in dict.fromkeys(every):
        if run.kind != "refine":
            ordered += [run, after[run.family]] if run.family in after else [run]
    return ordered


def shard(chosen: list[Run], part: tuple[int, int]) -> list[Run]:
    """Part i of n, from 1 on, by whole families."""
    i, n = part
    families = list(dict.fromkeys(run.family for run in chosen))
    mine = set(families[i - 1 :: n])
    return [run for run in chosen if run.family in mine]


def shard_of(text: str) -> tuple[int, int]:
    """`2/4`."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"expected i/n with i from 1 to n, such as 2/4, got {text!r}")
    return int(i), int(n)


def row_key(row: dict) -> tuple:
    """What a row measures: rows with one key are one measurement, made twice."""
    return row["model"], row["method"], row["structure"], tuple(row["blocks"] or ()), row["ratio"], row["dataset"]


def too_small(dense: torch.nn.Module, run: Run) -> ValueError | None:
    """Why the model's layers have no such blocks, if so."""
    try:
        resolve_plan(dense, BLRConfig(run.structure, ratio=run.ratio, num_blocks=run.blocks))
    except ValueError as error:
        return error


def make(bench: Bench, run: Run, earlier: dict[tuple, torch.nn.Module]) -> tuple[torch.nn.Module, dict]:
    """The compressed model and what its row says of the fit."""
    tokens = bench.windows.numel()
    if run.kind == "refine":
        model = earlier.pop(run.family, None)
        if model is None:
            model = make(bench, replace(run, kind="compress"), {})[0]
        refine(model, bench.dense, bench.windows, epochs=EPOCHS)
        return model, {"calibration_tokens": tokens, "finetune_tokens": EPOCHS * tokens}
    elif run.kind == "svd_llm":
        return baselines.svd_llm_updated(bench.dense, run.ratio, bench.statistics, bench.batches), {
            "calibration_tokens": tokens
        }
    elif run.kind == "descent":
        return baselines.blast_by_gradients(bench.dense, run.ratio, run.blocks, DESCENT_STEPS), {}
    else:
        model = copy.deepcopy(bench.dense)
        config = BLRConfig(run.structure, ratio=run.ratio, num_blocks=run.blocks, **dict(run.settings))
        on_text = {"calibration": bench.batches if config.sequential else None, "statistics": bench.statistics}
        report = compress(model, config, progress=False, **({} if run.kind == "weights" else on_text))
        earlier[run.family] = model
        return model, {
            "calibration_tokens": 0 if run.kind == "weights" else tokens,
            "mean_rel_error": report.mean_rel_error,
            "predicted_loss": report.predicted_loss,
        }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub id of a causal language model")
    options.add_loading(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--calibration", type=Path, help="text file to fit to")
    parser.add_argument("--evaluate", nargs="+", default=[], metavar="NAME=FILE", help="text files to score")
    parser.add_argument("--ids", type=Path, help="instead of texts: a torch file {valid: ids, NAME: ids, ...}")
    parser.add_argument("--only", nargs="+", default=["*"], help="labels or patterns, such as 'blast 4x16 0.5*'")
    parser.add_argument("--shard", type=shard_of, default=(1, 1), metavar="I/N", help="only part I of N of the runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after that")
    parser.add_argument("--beside", type=int, default=0, help="other runs on the device: no seconds are taken then")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    dense, tokenizer = options.load_model(args.model, args, tokenizer=args.ids is None)
    evaluate = {name: Path(path) for name, _, path in (item.partition("=") for item in args.evaluate)}
    name = Path(args.gguf_file or args.model).name.partition(".Q")[0]
    bench = Bench(name, dense.eval(), read_texts(args.calibration, evaluate, args.ids, tokenizer))
    machine = environment()
    commit = args.commit or machine["commit"]
    head = {"protocol": PROTOCOL, "environment": {**machine, "commit": commit}}
    file = ResultFile(args.json, head, append=True)
    done = {(row["method"], row["structure"], tuple(row["blocks"] or ()), row["ratio"]) for row in file.rows}
    print(f"statistics took {bench.statistics_seconds:.0f} s; dense {bench.dense_ppl}", flush=True)
    if ("dense", None, (), 1.0) not in done:
        file.add(bench.rows(bench.dense, "dense", 1.0, statistics_seconds=bench.statistics_seconds))
        if args.gguf_file:
            size = (Path(args.model) / args.gguf_file).stat().st_size
            file.add(bench.rows(bench.dense, "dense, its 4-bit GGUF file", 1.0, bytes=size))
    earlier: dict[tuple, torch.nn.Module] = {}
    for run in shard([run for run in runs() if any(fnmatch(run.label, pattern) for pattern in args.only)], args.shard):
        key = run.method, run.structure, tuple(run.blocks or ()), run.ratio
        if key in done or time.perf_counter() - started > args.seconds:
            continue
        if reason := too_small(bench.dense, run):
            print(f"{run.label}: {reason}", flush=True)
            continue
        if run.kind != "refine":
            earlier.clear()
        fit = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        model, more = make(bench, run, earlier)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            more["peak_memory"] = torch.cuda.max_memory_allocated()
        seconds = time.perf_counter() - fit
        more["fit_seconds"] = None if args.beside else seconds
        blocks = list(run.blocks) if run.blocks else None
        # a file grows over many runs, and commits
        rows = bench.rows(model, run.method, run.ratio, structure=run.structure, blocks=blocks, commit=commit, **more)
        file.add(rows)
        scores = ", ".join(f"{row['dataset']} {row['ppl']:.2f}" for row in rows)
        print(f"[{time.perf_counter() - started:.0f} s] {run.label}: {scores} ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
