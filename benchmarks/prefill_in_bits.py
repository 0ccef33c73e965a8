"""Times a forward of whole models in bits: `python benchmarks/prefill_in_bits.py --json results/models_h200.json`.

Each variant has a process of its own. All compile at once, and then take turns in rounds, as in `decode_in_bits.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.synchronize import Barrier, Lock, Semaphore
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conditions import RESULTS
from decode_in_bits import RATIO
from turns import Turns, in_turns, that_can_run

from hf_blr.bench import measure
from hf_blr.bench.environment import environment
from hf_blr.bench.models import SHAPES
from hf_blr.bench.profiling import profiled
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.rows import in_one_line, model_sizes, trained_names
from hf_blr.bench.timing import Timer, peak
from hf_blr.bench.variants import Variant, build_model

#: {variant: tokens of its forwards, the most first}; at 128-aligned ranks where speed is the aim
VARIANTS = {
    "dense": (4096, 1024),
    "low_rank@128/fp8+fused": (4096, 1024),
    "dense/fp8, torchao": (4096, 1024),
    "monarch:4x4@128/fp8+fused": (4096, 1024),
    "dense/fp8": (4096, 1024),
    "low_rank@128+fused": (4096, 1024),
    "low_rank/int4+fused": (1024,),
    "low_rank/fp8+fused": (1024,),
    "low_rank+fused": (1024,),
}
ROUNDS = 3
#: of a round, for each forward
SECONDS = 0.5


def rows_of(
    model_name: str,
    variant: str,
    sizes: tuple[int, ...],
    device: str,
    building: Semaphore,
    turn: Callable[[], AbstractContextManager[None]],
    so_far: Callable[[list[dict]], None],
) -> list[dict]:
    """The rows of one variant, timed within turns, at whose ends `so_far` is handed them."""
    shape, parsed = SHAPES[model_name], Variant.parse(variant)
    with building:
        model = build_model(shape, parsed, RATIO, device, torch.bfloat16)
        about: dict[str, Any] = {"model": model_name, "variant": variant, **model_sizes(model, trained_names(shape))}
        if device == "cuda":
            torch.cuda.empty_cache()
    about |= {"rival": True} if parsed.by else {"ratio": RATIO} if parsed.structure != "dense" else {}
    about |= {"measurement": "prefill", "batch": 1, "form": "compiled", "mode": "default"}
    timer = Timer(device, SECONDS)
    rows, runs = [], []
    with contextlib.ExitStack() as stack:
        for tokens in sizes:
            run = measure.forward_run(model, "text", 1, tokens, "compiled", "default", timer)
            runs.append(stack.enter_context(run))
            rows.append(about | {"tokens": tokens, "ms_of_rounds": []})
            # of the first: the others' has its graph in it
            if len(rows) == 1:
                rows[0]["peak_bytes"] = peak(timer.device)
        for _ in range(ROUNDS):
            with turn():
                for row, run in zip(rows, runs, strict=True):
                    row["ms_of_rounds"].append(timer.median(run) * 1e3)
                    row["ms"] = statistics.median(row["ms_of_rounds"])
                so_far(rows)
        if device == "cuda":
            with turn():
                for row, run in zip(rows, runs, strict=True):
                    row["profile"] = profiled(run)
                so_far(rows)
    return rows


def work(
    job: tuple[str, str, tuple[int, ...], str, str], building: Semaphore, together: Barrier, alone: Lock, path: str
) -> None:
    """Measure one variant, whose rows the file holds from the first round on: what stops a run takes one round."""
    name, variant, sizes, device, commit = job
    where = environment() | ({"commit": commit} if commit else {})
    head = {"environment": where, "dtype": "bfloat16", "protocol": measure.PROTOCOL}
    measured = [(name, variant, "prefill", 1, tokens) for tokens in sizes]

    def keep(rows: list[dict]) -> None:
        file = ResultFile(Path(path), head, append=True)
        file.rows = [row for row in file.rows if key_of(row) not in measured]
        file.add([row | {"commit": where["commit"]} for row in rows])

    # a GPU's rows have a profile too
    turns = Turns(together, alone, ROUNDS + (device == "cuda"))
    try:
        rows = rows_of(name, variant, sizes, device, building, turns.turn, keep)
    except Exception as error:
        with alone:
            print(variant, in_one_line(error), flush=True)
    else:
        with alone:
            for row in rows:
                print(variant, row["tokens"], f"{row['ms']:.3f}", row["ms_of_rounds"], flush=True)
    turns.pass_on()


def key_of(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("model", "variant", "measurement", "batch", "tokens"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="Llama-3-8B", choices=SHAPES)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--tokens", type=int, nargs="+", help="in place of each variant's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, default=RESULTS / "models_h200.json")
    parser.add_argument("--commit", default="", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    variants = that_can_run(args.variants)
    jobs = [(args.model, name, tuple(args.tokens or VARIANTS[name]), args.device, args.commit) for name in variants]
    in_turns(work, jobs, str(args.json))


if __name__ == "__main__":
    main()
