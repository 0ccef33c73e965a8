"""What a compression to int4 loses without each step of its fit: one row for each step that is left out.

    python benchmarks/rounding_steps.py --model FOLDER --gguf-file NAME --texts wikitext2=test.txt ptb=ptb.txt \
        --parts valid=valid.txt --calibration valid --json results/rounding_steps.json

Whole compressions, of whole matrices and of low-rank factors, of a model in another basis of its residual stream, whose
weights lie on no grid of the file that they come from.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import protocol
from calibration_sets import Calibration, Mixture
from protocol import PROTOCOL, TURNED, Bench, read_ids
from quality import make
from runs import Run
from runs_in_bits import runs_in_bits

from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import ResultFile
from hf_blr.calibration.regression import Regression
from hf_blr.cli import loading, options
from hf_blr.compression import turn_stream
from hf_blr.factorize import Factors, columns, rounding, with_codes
from hf_blr.factorize.bits import ToRound, rotation
from hf_blr.structures import BLRSpec

LOW_RANK = "low_rank 0.8 ours in int4"
LABELS = ("dense 1 GPTQ in int4", LOW_RANK)


def nearest(problem: ToRound, factor: Tensor, gram: Tensor | None, rows: Tensor | None = None) -> Any:
    return problem.storage.nearest(factor)


def without_rows(problem: ToRound, factor: Tensor, gram: Tensor | None, rows: Tensor | None = None) -> Any:
    return rounding.rounded_in_metric(factor, gram, problem.storage, None, problem.roots)


def without_refit(fitted: Factors, spec: BLRSpec, problem: ToRound) -> Factors:
    """Low-rank factors by all other steps; layers that stay whole have no u."""
    if "u" not in fitted.tensors:
        return with_codes(fitted, spec, problem)
    turn = rotation(spec.rank, problem.seed, fitted.tensors["v"])
    u, v = fitted.tensors["u"] @ turn.mT, turn @ fitted.tensors["v"]
    rows = problem.round(v, problem.gram, problem.behind(u[None]))
    behind = rows.numbers(torch.float32)
    codes = problem.round(u, behind @ problem.input_gram @ behind.mT, problem.coupling)
    return replace(fitted, tensors={"u": codes, "v": rows})


def weights_alone(regression: Regression, weights: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
    """The dense matrices as what is fitted, whatever the inputs have become."""
    return {name: weight.float() for name, weight in weights.items()}


#: {step: [(what does it, what stands in its place)]}
OFF: dict[str, list[tuple[str, Any]]] = {
    "none": [],
    "feedback, of columns and of rows": [("hf_blr.factorize.bits.ToRound.round", nearest)],
    "feedback between rows": [("hf_blr.factorize.bits.ToRound.round", without_rows)],
    "scales that clip": [
        ("hf_blr.formats.integers.CLIPS_BELOW", 0),
        # what is kept from other rows clips
        ("hf_blr.factorize.columns.fractions_on", columns.fractions_on.__wrapped__),
    ],
    "targets for the inputs as they have become": [("hf_blr.calibration.regression.Regression.targets", weights_alone)],
    "layers one after the other": [],
    "rotation of the rank": [
        ("hf_blr.structures.low_rank.rounding.rotation", lambda rank, seed, like: torch.eye(rank).to(like))
    ],
    "refit of u": [("hf_blr.factorize.with_codes", without_refit)],
}
#: of factors alone
OF_FACTORS = ("rotation of the rank", "refit of u")


@contextmanager
def without(step: str) -> Iterator[None]:
    with ExitStack() as stack:
        for path, other in OFF[step]:
            stack.enter_context(patch(path, other))
        yield


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    options.add_loading(parser, dtype="float32")
    parser.add_argument("--texts", nargs="+", required=True, help="what is scored, as in quality.py")
    parser.add_argument("--parts", nargs="+", required=True, help="what is fitted to, as in quality.py")
    parser.add_argument("--calibration", nargs="+", required=True, metavar="PART=SHARE")
    parser.add_argument("--windows", type=int, default=protocol.WINDOWS)
    parser.add_argument("--steps", nargs="+", choices=list(OFF), default=list(OFF), metavar="STEP")
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=LABELS, metavar="LABEL")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no row after that")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    dense, tokenizer = loading.load_model(args.model, args, reader=any("=" in s for s in args.texts + args.parts))
    name = f"{Path(args.gguf_file or args.model).name.partition('.Q')[0]}, {TURNED}"
    turn_stream(dense)
    bench = Bench(name, dense.eval(), read_ids(args.texts, tokenizer))
    parts = read_ids(args.parts, tokenizer)
    on = Calibration.draw(bench.dense, parts, Mixture.parse(args.calibration), 0, args.windows, protocol.SEQLEN)
    machine = environment()
    head = {
        "protocol": PROTOCOL,
        "fitted_to": on.facts(),
        "environment": {**machine, "commit": args.commit or machine["commit"]},
    }
    file = ResultFile(args.json, head)
    every = {run.label: run for run in runs_in_bits()}
    _ = on.statistics
    for label in args.labels:
        for step in args.steps:
            if step in OF_FACTORS and label != LOW_RANK:
                continue
            if time.perf_counter() - started > args.seconds:
                return
            row = row_of(bench, every[label], on, step)
            file.add([row])
            print(row, flush=True)


def row_of(bench: Bench, run: Run, on: Calibration, step: str) -> dict[str, Any]:
    if step == "layers one after the other":
        run = replace(run, settings=(*run.settings, ("sequential", False)))
    started = time.perf_counter()
    with without(step):
        model, more = make(run, on, {}, {})
    seconds = time.perf_counter() - started
    return {
        "model": bench.name,
        "structure": run.structure,
        "ratio": run.ratio,
        "format": run.format,
        "without": step,
        "rel_error": more["mean_rel_error"],
        "ppl": bench.score(model),
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
