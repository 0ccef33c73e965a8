"""Perplexity against size: baselines and ours on one protocol, in one process, to one file.

    python benchmarks/quality.py --model FOLDER --gguf-file NAME \
        --texts wikitext2=test.txt ptb=ptb.txt c4=c4.txt code=code.txt \
        --parts valid=valid.txt web=web.txt own.pt \
        --calibration valid --calibration valid=0.25 web=0.25 own=0.5 --seeds 0 1

Every run is made for each calibration set and each seed. Rows are written as soon as they are measured; a row that the
file holds is skipped, so a stopped run goes on. Several processes share the rows with `--shard 1/4 --json part1.json`
and so on; `merge.py` makes one file of theirs.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import baselines
import protocol
from calibration_sets import Calibration, Mixture
from protocol import PROTOCOL, TURNED, Bench, check_tokens, read_ids, sha256_of
from rates import best_rate
from runs import TEXTLESS, TRAINED, Run, row_key, runs, shard, shard_of
from runs_in_bits import runs_in_bits

from hf_blr import BLRConfig, compress, to_dense
from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import ResultFile
from hf_blr.checkpoint.record import forget_quantizer
from hf_blr.cli import loading, options
from hf_blr.compression import turn_stream
from hf_blr.finetune import refine
from hf_blr.plan import resolve_plan

#: steps of BLAST's own descent
DESCENT_STEPS = 100
#: what a plan says of a layer's format
STORED = ("format", "group_size")
#: over the windows of the fit, unless there are others to train on
EPOCHS = 8
#: enough to tell learning rates from each other
TRIAL_TOKENS = 600_000


def too_small(bench: Bench, run: Run) -> str | None:
    """Why some of the layers have no such blocks, if so: they would stay dense, and the model above its size."""
    if run.structure is None:
        return None
    plan = resolve_plan(bench.dense, run.config())
    left = [name for name in bench.targets if name not in plan]
    return f"{left[0]} and {len(left) - 1} other layers have no such blocks" if left else None


def make(
    run: Run, on: Calibration, earlier: dict[tuple, torch.nn.Module], training: dict
) -> tuple[torch.nn.Module, dict]:
    """The compressed model and what its row says of the fit; "kept" and "stored" are arguments of
    `Bench.rows`.

    training: arguments of `refine`.
    """
    dense, settings = on.dense, dict(run.settings)
    if run.kind == "refine dense":
        model = copy.deepcopy(dense)
        # transformers would not train what was read from a GGUF file
        forget_quantizer(model)
        return model, trained(model, on, run.rate, **training, **settings)
    elif run.kind == "refine":
        if run.family not in earlier:
            make(replace(run, kind="compress"), on, earlier, training)
        # another may go on from the same fit
        model = copy.deepcopy(earlier[run.family])
        return model, trained(model, on, run.rate, bits=run.trains, **training)
    elif run.kind == "refine around":
        return refined_around(run, on, training)
    elif run.kind == "svd_llm":
        return baselines.svd_llm_updated(dense, run.ratio, on.statistics, on.batches), {}
    elif run.kind == "aa_svd":
        return baselines.aa_svd(dense, run.ratio, on.batches, on.seed, **settings), {}
    elif run.kind == "modegpt":
        model, kept = baselines.modegpt(dense, run.ratio, on.statistics, on.batches, **settings)
        return model, {"kept": kept}
    elif run.kind == "descent":
        return baselines.blast_by_gradients(dense, run.ratio, run.blocks, DESCENT_STEPS, on.seed), {}
    elif run.kind == "torchao":
        own = {"scales": settings["scales"]} if "scales" in settings else {}
        model, stored = baselines.torchao_weights(dense, run.format, **own)
        return model, {"stored": stored}
    else:
        model = copy.deepcopy(dense)
        config = run.config(on.seed)
        on_text = {"calibration": on.batches if config.sequential else None, "statistics": on.statistics}
        report = compress(model, config, progress=False, **({} if run.kind == "weights" else on_text))
        earlier[run.family] = model
        more = {"mean_rel_error": report.mean_rel_error, "predicted_loss": report.predicted_loss}
        taken = Counter(layer.choice.taken for layer in report.layers if layer.choice)
        return model, more | ({"taken": dict(taken.most_common())} if taken else {})


def refined_around(run: Run, on: Calibration, training: dict) -> tuple[torch.nn.Module, dict]:
    """Trains the plain factors on half of the training windows, rounds what they became, and trains that on half.

    The ranks are those of the fit in bits, which groups divide; what it leaves whole is rounded with the factors.
    """
    halves = [replace(on, training=half) for half in on.training.chunk(2)]
    fitted = make(replace(run, kind="compress"), on, {}, training)[0]
    layers = fitted.config.quantization_config.layers
    factors = {name: layer for name, layer in layers.items() if layer["structure"] != "dense"}
    plain = {name: {key: layer[key] for key in layer if key not in STORED} for name, layer in factors.items()}
    model = copy.deepcopy(on.dense)
    compress(model, BLRConfig(layers=plain), calibration=on.batches, statistics=on.statistics, progress=False)
    trained(model, halves[0], run.rate, **training)
    compress(to_dense(model), BLRConfig(layers=layers), calibration=on.batches, progress=False)
    return model, {
        **trained(model, halves[1], run.rate, bits=run.trains, **training),
        "finetune_sha256": sha256_of(on.training),
    }


def trained(
    model: torch.nn.Module, on: Calibration, rate: float, rates: Sequence[float] = (), trial_tokens: int = 0, **settings
) -> dict:
    """Refines the model in place; returns what its rows say of that.

    rate: unless there are `rates`; of several, the best on held-out windows after some `trial_tokens` of training.
    """
    # code that is compiled once serves all runs
    settings = {"compiled": torch.cuda.is_available(), "seed": on.seed, **settings}
    said = {"finetune_sha256": sha256_of(on.training), "finetune_batch": settings["batch_size"]}
    judge = on.judge
    # a dense model's divergence from itself says nothing
    score = judge.loss if "dense_rate" in settings else judge.divergence
    if len(rates) > 1:
        trial = {**settings, "epochs": 1}
        steps = max(1, round(trial_tokens / on.training[: settings["batch_size"]].numel()))
        windows = on.training[: steps * settings["batch_size"]]

        def train(copied: torch.nn.Module, rate: float) -> None:
            refine(copied, on.dense, windows, learning_rate=rate, **trial)

        rate, choice = best_rate(model, rates, train, score)
        said |= {**choice, "rate_tokens": windows.numel()}
    elif rates:
        (rate,) = rates
    said["learning_rate"] = rate
    if len(on.held_out):
        said |= {"held_out_sha256": sha256_of(on.held_out), "divergence_before": judge.divergence(model)}
    refine(model, on.dense, on.training, learning_rate=rate, **settings)
    return said | ({"divergence": judge.divergence(model)} if len(on.held_out) else {})


def epochs_of(on: Calibration, tokens: int) -> int:
    """How often the training windows come: for some `tokens` where there is text besides that of the fit."""
    return max(1, round(tokens / on.training.numel())) if len(on.training) > len(on.windows) else EPOCHS


def facts_of(run: Run, on: Calibration, epochs: int) -> dict:
    """What tells the run's rows from others, before anything is measured."""
    fitted = {"calibration": None, "calibration_tokens": 0, "seed": on.seed} if run.kind in TEXTLESS else on.facts()
    trained = {"finetune_tokens": 0}
    if run.kind in TRAINED:
        trained = {"finetune_tokens": epochs * on.training.numel(), "finetune_mixture": on.trained_on.label}
    return {**run.facts(), **fitted, **trained}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or hub id of a causal language model")
    options.add_loading(parser)
    parser.set_defaults(dtype="float32")
    sources = "NAME=FILE of a text each, or torch files {NAME: token ids}"
    parser.add_argument("--texts", nargs="+", required=True, metavar="TEXT", help=f"what is scored: {sources}")
    parser.add_argument(
        "--parts", nargs="+", required=True, metavar="PART", help=f"what calibration sets draw windows from: {sources}"
    )
    parser.add_argument(
        "--calibration",
        nargs="+",
        action="append",
        required=True,
        metavar="PART=SHARE",
        help="a calibration set; may be given several times",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the windows drawn, the fits and the training"
    )
    parser.add_argument("--windows", type=int, default=protocol.WINDOWS, help="of a calibration set, at most")
    parser.add_argument(
        "--again", action="store_true", help="a part with fewer windows than its share comes again in the fit too"
    )
    parser.add_argument("--train-windows", type=int, default=0, help="to refine on; those of the fit if left out")
    parser.add_argument(
        "--train-mixture", nargs="+", metavar="PART=SHARE", help="of these windows; that of the fit if left out"
    )
    parser.add_argument("--train-tokens", type=int, default=10_000_000, help="in all epochs over those windows")
    parser.add_argument("--train-batch", type=int, default=8, help="windows of a step of a training")
    parser.add_argument(
        "--train-rate",
        type=float,
        nargs="+",
        default=[],
        help="its learning rate, that of the run if left out; of several, the best on held-out windows",
    )
    parser.add_argument(
        "--trial-tokens", type=int, default=TRIAL_TOKENS, help="on which each of several rates is tried"
    )
    parser.add_argument("--held-out", type=int, default=0, help="windows that are neither fitted to nor trained on")
    parser.add_argument(
        "--turned", action="store_true", help="the dense model in another basis of its residual stream, before all else"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=["*"],
        help="labels or patterns, such as 'blast 4x16 0.5*', in the order in which they run",
    )
    parser.add_argument("--shard", type=shard_of, default=(1, 1), metavar="I/N", help="only part I of N of the runs")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after that")
    parser.add_argument("--beside", type=int, default=0, help="other runs on the device: no seconds are taken then")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--json", type=Path, required=True, help="result file to write or to go on with")
    args = parser.parse_args(argv)
    if len(args.train_rate) > 1 and not args.held_out:
        parser.error("several learning rates are compared on held-out windows: name --held-out windows too")
    started = time.perf_counter()
    dense, tokenizer = loading.load_model(args.model, args, reader=any("=" in s for s in args.texts + args.parts))
    name = Path(args.gguf_file or args.model).name.partition(".Q")[0]
    if args.turned:
        turn_stream(dense)
        name = f"{name}, {TURNED}"
    bench = Bench(name, dense.eval(), read_ids(args.texts, tokenizer))
    print(f"[{time.perf_counter() - started:.0f} s] dense {bench.dense_ppl}", flush=True)
    parts = read_ids(args.parts, tokenizer)
    mixtures = [Mixture.parse(items) for items in args.calibration]
    trained_on = Mixture.parse(args.train_mixture) if args.train_mixture else None
    machine = environment()
    commit = args.commit or machine["commit"]
    file = ResultFile(args.json, {"protocol": PROTOCOL, "environment": {**machine, "commit": commit}}, append=True)
    # a file grows over many runs, and commits
    own = {"commit": commit, "fit_seconds": 0.0}
    dense_facts = {"method": "dense", "ratio": 1.0, "calibration": None, "calibration_tokens": 0, "seed": None}
    dense_facts |= {"finetune_tokens": 0, **own}
    rows = bench.rows(bench.dense, dense_facts)
    check_tokens([*file.rows, *rows])
    done = {row_key(row) for row in file.rows}
    if row_key(rows[0]) not in done:
        file.add(rows)
        if args.gguf_file and not args.turned:
            size = (Path(args.model) / args.gguf_file).stat().st_size
            file.add(bench.rows(bench.dense, {**dense_facts, "method": "dense, its 4-bit GGUF file", "bytes": size}))
    every = [*runs(), *runs_in_bits()]
    wanted = dict.fromkeys(run for pattern in args.only for run in every if fnmatch(run.label, pattern))
    chosen = shard(list(wanted), args.shard)
    for mixture, seed in ((mixture, seed) for mixture in mixtures for seed in args.seeds):
        sizes = args.windows, protocol.SEQLEN, args.train_windows
        on = Calibration.draw(bench.dense, parts, mixture, seed, *sizes, trained_on, args.again, args.held_out)
        check_tokens([*file.rows, {"model": name, **on.facts()}])
        epochs = epochs_of(on, args.train_tokens)
        training = {"epochs": epochs, "batch_size": args.train_batch}
        training |= {"rates": args.train_rate, "trial_tokens": args.trial_tokens}
        earlier: dict[tuple, torch.nn.Module] = {}
        for run in chosen:
            facts = {**facts_of(run, on, epochs), **own}
            keys = {row_key({**facts, "model": name, "dataset": text}) for text in bench.texts}
            if keys <= done or time.perf_counter() - started > args.seconds:
                continue
            if reason := too_small(bench, run):
                print(f"{run.label}: {reason}", flush=True)
                continue
            if run.kind != "refine":
                earlier.clear()
            if run.kind not in (*TEXTLESS, "refine dense", "aa_svd"):
                # what all fits share is no part of the first one's seconds
                _ = on.statistics
            fit = time.perf_counter()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            model, more = make(run, on, earlier, training)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                more["peak_memory"] = torch.cuda.max_memory_allocated()
            seconds = time.perf_counter() - fit
            more["fit_seconds"] = None if args.beside else seconds
            kept, stored = more.pop("kept", None), more.pop("stored", None)
            rows = bench.rows(model, {**facts, **more}, kept, stored)
            file.add(rows)
            done |= keys
            scores = ", ".join(f"{row['dataset']} {row['ppl']:.2f}" for row in rows)
            where = f"{facts['calibration']}, seed {seed}"
            print(
                f"[{time.perf_counter() - started:.0f} s] {run.label}, {where}: {scores} ({seconds:.0f} s)", flush=True
            )


if __name__ == "__main__":
    main()
