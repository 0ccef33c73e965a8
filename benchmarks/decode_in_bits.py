"""Times a decoding step of whole models in bits: `python benchmarks/decode_in_bits.py --json results/decode_h200.json`.

Each row has a process of its own. Those of one batch compile at once. Then they take turns in rounds, so that each is
timed with the card to itself, and at the clock and temperature that the others have.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.synchronize import Barrier, Lock, Semaphore
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conditions import RESULTS

from hf_blr.bench import generation
from hf_blr.bench.environment import environment
from hf_blr.bench.models import SHAPES
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.rivals import missing
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


class Turns:
    """The rounds of several processes, in each of which every one has the device to itself once."""

    def __init__(self, together: Barrier, alone: Lock, count: int):
        self.together, self.alone, self.left = together, alone, count

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until all others are in the same round, and none has its turn."""
        self.together.wait()
        self.left -= 1
        with self.alone:
            yield

    def pass_on(self) -> None:
        """Let the others have the rounds that are left."""
        while self.left:
            with self.turn():
                pass


def row_of(
    model_name: str,
    variant: str,
    batch: int,
    device: str,
    building: Semaphore,
    turn: Callable[[], AbstractContextManager[None]],
) -> dict:
    """The row of one variant that decodes `batch` texts, timed within turns."""
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
    return row | generation.decode(model, *sizes, "compiled", "default", device, profiles, ROUNDS, turn)


def work(job: tuple[str, str, int, str, str], building: Semaphore, together: Barrier, alone: Lock, path: str) -> None:
    """Measure one row and add it to the file."""
    name, variant, batch, device, commit = job
    # a GPU's rows have a profile too
    turns = Turns(together, alone, ROUNDS + (device == "cuda"))
    try:
        row = row_of(name, variant, batch, device, building, turns.turn)
    except Exception as error:
        row = {"model": name, "variant": variant, "measurement": "decode", "batch": batch, "error": in_one_line(error)}
    where = environment() | ({"commit": commit} if commit else {})
    head = {"environment": where, "dtype": "bfloat16", "protocol": PROTOCOL}
    with alone:
        ResultFile(Path(path), head, append=True).add([row])
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
    context = multiprocessing.get_context("spawn")
    absent = {name: missing(Variant.parse(name).by) for name in args.variants if name in RIVAL_VARIANTS}
    for name in (name for name, reason in absent.items() if reason):
        print(f"{name} is left out: {absent[name]}")
    variants = [variant for variant in args.variants if not absent.get(variant)]
    for batch in args.batches:
        jobs = [(args.model, variant, batch, args.device, args.commit) for variant in variants]
        # two are built at a time: each takes the memory of a dense model
        shared = context.Semaphore(2), context.Barrier(len(jobs)), context.Lock(), str(args.json)
        processes = [context.Process(target=work, args=(job, *shared)) for job in jobs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main()
