"""Times a decoding step of whole models in bits: `python benchmarks/decode_in_bits.py --json results/decode_h200.json`.

Each row has a process of its own. Those of one batch compile at once. Then they take turns in rounds, so that each is
timed with the card to itself, and at the clock and temperature that the others have.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.synchronize import Barrier, Lock, Semaphore
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conditions import RESULTS
from turns import Turns, in_turns, that_can_run

from hf_blr.bench import generation
from hf_blr.bench.environment import environment
from hf_blr.bench.models import SHAPES
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.rows import in_one_line, model_sizes, trained_names
from hf_blr.bench.variants import Variant, build_model

#: dense layers by other libraries
RIVAL_VARIANTS = ("dense/int4, PyTorch", "dense/int4, gemlite", "dense/fp8, gemlite", "dense/fp8, torchao")
VARIANTS = ("dense", *RIVAL_VARIANTS, "dense/int4", "low_rank+fused", "low_rank/fp8+fused", "low_rank/int4+fused")
RATIO, PROMPT, NEW_TOKENS, ROUNDS = 0.5, 128, 48, 5
PROTOCOL = (
    "random weights, half of each projection kept in low-rank; generate() on a static cache, the prompt and the first "
    "steps not counted, median of five; one compiled block for all layers, the step one CUDA graph with dependent "
    "launches; graph_ms: the median of five rounds, each a median of the graph's replays. A process for each row: all "
    "compile at once, then each is timed alone, once in each round"
)


def row_of(
    model_name: str,
    variant: str,
    batch: int,
    device: str,
    building: Semaphore,
    turn: Callable[[], AbstractContextManager[None]],
    so_far: Callable[[dict], None],
) -> dict:
    """The row of one variant that decodes `batch` texts, timed within turns, at whose ends `so_far` is handed it."""
    shape = SHAPES[model_name]
    parsed = Variant.parse(variant)
    with building:
        model: Any = build_model(shape, parsed, RATIO, device, torch.bfloat16)
        row = {"model": model_name, "variant": variant, **model_sizes(model, trained_names(shape))}
        if parsed.by:
            row["rival"] = True
        if device == "cuda":
            torch.cuda.empty_cache()
    settings = {"measurement": "decode", "batch": batch, "tokens": 1, "form": "compiled", "mode": "default"}
    row |= settings | {"prompt": PROMPT, "new_tokens": NEW_TOKENS} | ({"ratio": RATIO} if "low_rank" in variant else {})
    profiles = device == "cuda"
    sizes = batch, PROMPT, NEW_TOKENS
    return row | generation.decode(
        model, *sizes, "compiled", "default", device, profiles, ROUNDS, turn, lambda found: so_far(row | found)
    )


def work(job: tuple[str, str, int, str, str], building: Semaphore, together: Barrier, alone: Lock, path: str) -> None:
    """Measure one row, which the file holds from its first round on: what stops a run takes one round."""
    name, variant, batch, device, commit = job
    where = environment() | ({"commit": commit} if commit else {})
    head = {"environment": where, "dtype": "bfloat16", "protocol": PROTOCOL}

    def keep(row: dict) -> None:
        file = ResultFile(Path(path), head, append=True)
        file.rows = [kept for kept in file.rows if (kept["variant"], kept["batch"]) != (variant, batch)]
        file.add([row])

    # a GPU's rows have a profile too
    turns = Turns(together, alone, ROUNDS + (device == "cuda"))
    try:
        row = row_of(name, variant, batch, device, building, turns.turn, keep)
    except Exception as error:
        row = {"model": name, "variant": variant, "measurement": "decode", "batch": batch, "error": in_one_line(error)}
    with alone:
        keep(row)
        print(variant, batch, row.get("graph_ms"), row.get("ms"), row.get("error"), flush=True)
    turns.pass_on()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3-8B", choices=SHAPES)
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, default=RESULTS / "decode_h200.json")
    parser.add_argument("--commit", default="", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    variants = that_can_run(args.variants)
    for batch in args.batches:
        jobs = [(args.model, variant, batch, args.device, args.commit) for variant in variants]
        in_turns(work, jobs, str(args.json))


if __name__ == "__main__":
    main()
