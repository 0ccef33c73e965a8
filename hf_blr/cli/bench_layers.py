"""`hf-blr bench layers`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from hf_blr.bench import cases, layers
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.rivals import RIVALS, missing
from hf_blr.bench.shapes import LAYERS
from hf_blr.bench.timing import Timer
from hf_blr.cli.bench_rows import add_common, head
from hf_blr.cli.options import block_counts as sizes
from hf_blr.formats import FORMATS, PLAIN
from hf_blr.structures import structures


def add_layers_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="*", default=list(LAYERS), choices=list(LAYERS), help="whose layers")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=sizes,
        default=[],
        metavar="KxN",
        help="other layers, in x out features, instead",
    )
    parser.add_argument("--blocks", nargs="+", type=sizes, default=[(4, 4), (4, 16)], help="B1xB2, with --shapes")
    parser.add_argument(
        "--structures", nargs="+", default=list(structures()), choices=list(structures()), help="with --shapes"
    )
    parser.add_argument("--ratio", type=float, default=0.5, help="kept / dense parameters, with --shapes")
    parser.add_argument(
        "--rank-multiple", type=int, metavar="N", help="cut ranks as BLRConfig's rank_multiple does, with --shapes"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=list(cases.TOKENS), help="rows of the input")
    directions = (cases.FORWARD, cases.TRAINING)
    parser.add_argument("--directions", nargs="+", default=directions, choices=directions, help="what is timed")
    parser.add_argument(
        "--impls",
        nargs="+",
        default=cases.IMPLS,
        choices=cases.IMPLS,
        help="hf_blr: as layers run; eager and compiled: their plain form, without and with torch.compile",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        default=[PLAIN.name],
        choices=list(FORMATS),
        help="how factors are stored; in bits the forward alone is timed",
    )
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile the kernels first")
    parser.add_argument(
        "--skip-first-call", action="store_true", help="do not measure first calls with nothing compiled before"
    )
    add_common(parser)


def bench_layers(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    if args.shapes:
        sizes = args.shapes, args.blocks, args.ratio, args.tokens, args.directions, args.structures
        todo = cases.shape_cases(*sizes, args.rank_multiple)
    else:
        todo = cases.paper_cases(args.models, args.tokens, args.directions)
    file = ResultFile(args.json, head(args, layers.PROTOCOL), args.append)
    first_calls: list[layers.FirstCalls] = [{} for _ in todo]
    if args.device != "cpu" and not args.skip_first_call and "hf_blr" in args.impls:
        first_calls = compile_kernels(todo, args, dtype)
    for reason in sorted({missing(name) or "" for form in args.formats for name in RIVALS.get(form, {})} - {""}):
        print(f"left out beside ours: {reason}", flush=True)
    timer = Timer(args.device)
    for case, seconds in zip(todo, first_calls, strict=True):
        rows = layers.bench_case(case, timer, dtype, args.impls, seconds, args.formats)
        file.add(rows)
        for row in rows:
            print(layer_line(row), flush=True)


def compile_kernels(todo: list[cases.Case], args: argparse.Namespace, dtype: torch.dtype) -> list[layers.FirstCalls]:
    """Each case's first-call seconds, measured in several processes, which leave the kernels for this one."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    each = [
        (i, replace(case, specs=(spec,)), name)
        for i, case in enumerate(todo)
        for spec in case.specs
        for name in args.formats
    ]
    found: list[layers.FirstCalls] = [{} for _ in todo]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            (i, pool.submit(layers.first_call_seconds, case, args.device, dtype, cache, [name]))
            for i, case, name in each
        ]
        for i, job in jobs:
            found[i] |= job.result()
    return found


def layer_line(row: dict) -> str:
    where = f"{row['model']:13} {row['layer']:10} {row['tokens']:5} {row['direction'][7:]:9}"
    what = f"{row['structure']:8} {row['blocks'][0]:2}x{row['blocks'][1]:<2} {row['format']:5} {row['impl']:8}"
    first = "" if row["first_call_s"] is None else f"  first call {row['first_call_s']:.1f} s"
    return f"{where} {what} {row['us']:9.1f} us {row['speedup_vs_dense']:5.2f}x  error {row['rel_error']:.1e}{first}"
