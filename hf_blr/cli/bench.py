"""measure speed: `bench layers` one layer at a time, `bench model` whole models

Both use random weights, print rows as they come, and with --json write them after every row.

Example: hf-blr bench layers --models Llama-7B --tokens 1 1024 --json layers.json
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_blr.bench import cases, layers
from hf_blr.bench.compile_first import compile_first
from hf_blr.bench.environment import environment
from hf_blr.bench.forms import FORMS, MODES
from hf_blr.bench.measure import MEASUREMENTS, PROTOCOL
from hf_blr.bench.models import SHAPES, Shape
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.rows import Request, model_rows
from hf_blr.bench.shapes import LAYERS
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant
from hf_blr.cli import options
from hf_blr.cli.options import block_counts as sizes
from hf_blr.formats import FORMATS, PLAIN
from hf_blr.structures import structures

#: the paper's ranks, and ours, as `hf_blr.fuse` makes them run
VARIANTS = (
    "dense",
    "low_rank:paper+fused",
    "monarch:paper+fused",
    "blast:paper+fused",
    "low_rank+fused",
    "monarch:4x4+fused",
    "blast:4x4+fused",
    "blast:4x16+fused",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True, metavar="layers | model")
    layers_parser = what.add_parser("layers", help="one layer", formatter_class=parser.formatter_class)
    add_layers_arguments(layers_parser)
    layers_parser.set_defaults(bench=bench_layers)
    model_parser = what.add_parser("model", help="whole models", formatter_class=parser.formatter_class)
    add_model_arguments(model_parser)
    model_parser.set_defaults(bench=bench_model)


def run(args: argparse.Namespace) -> None:
    args.bench(args)


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=options.default_device(), help="where to run")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default="bfloat16", choices=dtypes, help="of weights and inputs")
    parser.add_argument("--append", action="store_true", help="keep the rows that the --json file holds already")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    options.add_json(parser)


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
        todo = cases.shape_cases(args.shapes, args.blocks, args.ratio, args.tokens, args.directions, args.structures)
    else:
        todo = cases.paper_cases(args.models, args.tokens, args.directions)
    file = ResultFile(args.json, head(args, layers.PROTOCOL), args.append)
    first_calls: list[layers.FirstCalls] = [{} for _ in todo]
    if args.device != "cpu" and not args.skip_first_call and "hf_blr" in args.impls:
        first_calls = compile_kernels(todo, args, dtype)
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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    request = Request()
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="of whose sizes")
    parser.add_argument(
        "--variants",
        nargs="+",
        type=variant,
        metavar="V",
        help="dense (+attention: with that of fused models), or a structure, with :paper for the paper's ranks or "
        ":B1xB2 for blocks after it; then /FORMAT in which factors, or matrices of dense, are kept, and +fused where "
        "projections with one input are to run together, as in low_rank/int4+fused; "
        f"{' '.join(VARIANTS)} if left out, as far as the paper has the model",
    )
    parser.add_argument("--measure", nargs="+", default=MEASUREMENTS, choices=MEASUREMENTS, help="what is measured")
    parser.add_argument("--forms", nargs="+", default=request.forms, choices=FORMS, help="of forwards and generation")
    parser.add_argument("--mode", default=request.mode, choices=MODES, help="of torch.compile")
    parser.add_argument("--ratio", type=float, default=request.ratio, help="kept / dense parameters of a layer")
    parser.add_argument("--tokens", nargs="+", type=int, help="of a forward; the usual ones if left out")
    parser.add_argument("--batches", nargs="+", type=int, default=request.batches, help="of a forward")
    parser.add_argument(
        "--decode-batches", nargs="+", type=int, default=request.decode_batches, help="texts of a generation"
    )
    parser.add_argument("--prompt", type=int, default=request.prompt, help="tokens before generation")
    parser.add_argument("--new-tokens", type=int, default=request.new_tokens, help="tokens generated")
    parser.add_argument("--training-batch", type=int, default=request.training_batch, help="texts of a training step")
    parser.add_argument("--training-tokens", type=int, default=request.training_tokens, help="tokens of each")
    parser.add_argument(
        "--activation-budget",
        type=float,
        default=request.activation_budget,
        help="share of a training step's activations that compiled blocks keep, 0 to 1; the others are computed again",
    )
    parser.add_argument("--blocks", type=int, help="repeated blocks to build in place of all")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the repetitions of one measurement")
    parser.add_argument("--profile", action="store_true", help="also say what the kernels of a graph take, on a GPU")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile first, with --mode default")
    add_common(parser)


def bench_model(args: argparse.Namespace) -> None:
    request = Request(
        measurements=tuple(args.measure),
        tokens=args.tokens and tuple(args.tokens),
        batches=tuple(args.batches),
        forms=tuple(args.forms),
        mode=args.mode,
        decode_batches=tuple(args.decode_batches),
        prompt=args.prompt,
        new_tokens=args.new_tokens,
        training_batch=args.training_batch,
        training_tokens=args.training_tokens,
        activation_budget=args.activation_budget,
        ratio=args.ratio,
        dtype=getattr(torch, args.dtype),
        blocks=args.blocks,
        profile=args.profile,
        stop_at_errors=args.traceback,
    )
    about = head(args, PROTOCOL)
    file = ResultFile(args.json, about, args.append)
    variants = {name: args.variants or usual_variants(SHAPES[name]) for name in args.models}
    if args.jobs:
        compile_first([(name, v) for name in variants for v in variants[name]], request, args.device, args.jobs)
    timer = Timer(args.device, args.seconds)
    for name in args.models:
        for row in model_rows(name, SHAPES[name], variants[name], request, timer):
            # a file may grow over many runs, and commits
            file.add([row | {"commit": about["environment"]["commit"]}])
            print(model_line(row), flush=True)


def usual_variants(shape: Shape) -> list[Variant]:
    """Those of `VARIANTS` that the model has."""
    found = list(map(Variant.parse, VARIANTS))
    if not shape.paper:
        found = [v for v in found if not v.paper]
    if any(layer.monarch is None for layer in shape.paper):
        found = [v for v in found if not (v.paper and v.structure == "monarch")]
    return found


def model_line(row: dict) -> str:
    where = f"{row['model']:13} {row['variant']:17} {row['measurement']:9}"
    if "error" in row:
        return f"{where} {row['error']}"
    if row["measurement"] == "storage":
        return (
            f"{where} {row['disk_bytes'] / 1e9:.3f} GB, saved in {row['save_s']:.1f} s, loaded in {row['load_s']:.1f} s"
        )
    form = f"{row['form']} ({row['mode']})" if "mode" in row else row["form"]
    memory = "" if row["peak_bytes"] is None else f"  peak {row['peak_bytes'] / 1e9:.2f} GB"
    speed = f"  {row['tokens_per_second']:.1f} tokens/s" if "tokens_per_second" in row else ""
    graph = f" ({row['graph_ms']:.2f} in its graph)" if "graph_ms" in row else ""
    profile = ""
    if "profile" in row:
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in row["profile"]["parts"].items() if ms)
        profile = f"  [{parts}]"
    return f"{where} {row['batch']:2} x {row['tokens']:<5} {form:23} {row['ms']:9.2f} ms{graph}{speed}{memory}{profile}"


def variant(text: str) -> Variant:
    try:
        return Variant.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def layer_line(row: dict) -> str:
    where = f"{row['model']:13} {row['layer']:10} {row['tokens']:5} {row['direction'][7:]:9}"
    what = f"{row['structure']:8} {row['blocks'][0]:2}x{row['blocks'][1]:<2} {row['format']:5} {row['impl']:8}"
    first = "" if row["first_call_s"] is None else f"  first call {row['first_call_s']:.1f} s"
    return f"{where} {what} {row['us']:9.1f} us {row['speedup_vs_dense']:5.2f}x  error {row['rel_error']:.1e}{first}"


def head(args: argparse.Namespace, protocol: str) -> dict[str, Any]:
    """What stands above the rows of a result file."""
    where = environment() | ({"commit": args.commit} if args.commit else {})
    return {"environment": where, "dtype": args.dtype, "protocol": protocol}
