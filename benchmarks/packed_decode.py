"""Times layers in bits at few tokens, dense ones beside: `python benchmarks/packed_decode.py --tokens 16`.

Layers of Llama-3-8B's shape in low-rank at half, whose codes and scales are random. Each row is in the file as soon as
it is measured; rows of the file that are not measured again stay.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.nn.functional as F
from conditions import RESULTS
from torch import Tensor

from hf_blr.bench import rivals
from hf_blr.bench.environment import environment
from hf_blr.bench.report.commits import rows_of
from hf_blr.bench.report.files import ResultFile, read_result
from hf_blr.bench.rows import in_one_line
from hf_blr.bench.timing import Timer
from hf_blr.ops.triton import low_rank
from hf_blr.ops.triton.bits import Weights, weights_in_bits, weights_of

#: (in features, out features, rank, rank in groups)
LAYERS = ((4096, 4096, 1024, 1024), (4096, 14336, 1584, 1536), (14336, 4096, 1584, 1536))
#: (format, numbers that share a scale or all of a row, whether in low-rank)
KINDS = (
    ("plain", None, False),
    ("int4", 128, False),
    ("plain", None, True),
    ("int4", 128, True),
    ("int4", None, True),
    ("fp8", None, True),
    ("int8", None, True),
)
#: of the copies of a layer that one graph runs, and how many they are at least
BYTES, COPIES = 160e6, 4
#: graphs of each row, each captured anew
GRAPHS = 2
PROTOCOL = (
    "a CUDA graph of as many copies of a layer as take 160 MB, at least four; medians of nine replays, at 1 and 16 "
    "tokens means of two graphs; low-rank in two launches or three, of rank 1024 or 1584, in groups 1536, random codes "
    "and scales; dense by cuBLAS, dense in int4 by PyTorch's _weight_int4pack_mm with groups of 128"
)

Job = tuple[tuple[int, int, int, int], tuple[str, int | None, bool], int]


def factor(form: str, group: int | None, q: int, k: int, device: str, dtype: torch.dtype) -> Weights:
    """A random matrix `[q, k]`."""
    if form == "plain":
        return weights_of(torch.randn(q, k, device=device).to(dtype))
    scale = (torch.rand(q, k // group if group else 1, device=device) + 0.5).to(torch.bfloat16) * 2**-5
    if form == "fp8":
        return weights_in_bits(torch.randn(q, k, device=device).to(torch.float8_e4m3fn), scale, 8, k)
    bits = int(form.removeprefix("int"))
    words = torch.randint(-(2**31), 2**31 - 1, (q, -(-k * bits // 32)), device=device).to(torch.int32)
    return weights_in_bits(words, scale, bits, k)


def made(job: Job, device: str, copies: int | None = None) -> tuple[Callable[[Any], Tensor], list]:
    """(call of one copy of the layer, the copies)."""
    (k, n, plain_rank, rank), (form, group, factored), tokens = job
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    x = torch.randn(tokens, k, device=device).to(dtype)
    rank = rank if group else plain_rank
    size = (rank * (n + k) if factored else n * k) * {"plain": 2, "int4": 0.5}.get(form, 1)
    count = copies or max(COPIES, math.ceil(BYTES / size))
    if factored:
        u, v = factor(form, group, n, rank, device, dtype), factor(form, group, rank, k, device, dtype)
        return (lambda pair: low_rank.decode(x, *pair, None)), [tuple(map(cloned, (u, v))) for _ in range(count)]
    weight = torch.randn(n, k, device=device).to(dtype)
    if form == "plain":
        return (lambda one: F.linear(x, one)), [weight.clone() for _ in range(count)]
    forward, tensors, _ = rivals.int4_by_pytorch(weight, group)
    return (lambda one: forward(x, *one)), [[t.clone() for t in tensors] for _ in range(count)]


def cloned(w: Weights) -> Weights:
    return w._replace(data=w.data.clone(), scale=None if w.scale is None else w.scale.clone())


def compiled(job: Job) -> str | None:
    """Call the layer once; what went wrong."""
    try:
        call, copies = made(job, "cuda", 1)
        call(copies[0])
        torch.cuda.synchronize()
    except Exception as error:
        return f"{job}: {in_one_line(error)}"
    return None


def microseconds(job: Job, device: str) -> list[float]:
    """Of one call, by each of the graphs."""
    call, copies = made(job, device)
    timer = Timer(device, replays=9)
    return [round(timer(call, copies, flush=False), 2) for _ in range(GRAPHS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 1, 8, 32])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=6, help="that compile first, on a GPU; 0: none")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--json", type=Path, default=RESULTS / "packed_decode_h200.json")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    jobs: list[Job] = [(layer, kind, tokens) for tokens, layer, kind in itertools.product(args.tokens, LAYERS, KINDS)]
    if args.device == "cuda" and args.processes:
        with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            for said in pool.map(compiled, [job for job in jobs if job[1][2]]):
                if said:
                    print(said, flush=True)
    if args.compile_only:
        return
    where = environment() | ({"commit": args.commit} if args.commit else {})
    head = {"environment": where, "dtype": "bfloat16", "protocol": PROTOCOL}
    file = ResultFile(args.json, head, append=True)
    if file.rows:
        before = read_result(args.json)
        # tests and numbers of other runs stand above the rows, of which each is of its own commit
        file.head, file.rows = {key: value for key, value in before.items() if key != "rows"} | head, rows_of(before)
    for job in jobs:
        row = row_of(job)
        try:
            us = microseconds(job, args.device)
        except Exception as error:
            print(f"{job} is left out: {in_one_line(error)}", flush=True)
            continue
        file.rows = [kept for kept in file.rows if any(kept[name] != value for name, value in row.items())]
        file.add([row | {"us": us, "commit": where["commit"]}])
        print(*row.values(), f"{statistics.mean(us):.2f} us", us, flush=True)


def row_of(job: Job) -> dict[str, Any]:
    """What a row says of its layer; in groups, ranks are multiples of them."""
    (k, n, plain_rank, rank), (form, group, factored), tokens = job
    sizes = {"in_features": k, "out_features": n, "rank": (rank if group else plain_rank) if factored else None}
    return sizes | {"tokens": tokens, "format": form, "group": group}


if __name__ == "__main__":
    main()
