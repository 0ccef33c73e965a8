"""`hf-blr bench model`."""

from __future__ import annotations

import argparse

import torch

from hf_blr.bench.compile_first import compile_first
from hf_blr.bench.forms import FORMS, MODES
from hf_blr.bench.measure import MEASUREMENTS, PROTOCOL
from hf_blr.bench.models import SHAPES, Shape
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.rows import Request, model_rows
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant
from hf_blr.cli.bench_rows import add_common, head

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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    request = Request()
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES), help="of whose sizes")
    parser.add_argument(
        "--variants",
        nargs="+",
        type=variant,
        metavar="V",
        help="dense (+attention: with that of fused models), or a structure, with :paper for the paper's ranks or "
        ":B1xB2 for blocks after it, and @N for ranks cut as BLRConfig's rank_multiple does; then /FORMAT in which "
        "factors, or matrices of dense, are kept, and +fused where projections with one input are to run together, as "
        "in low_rank/int4+fused; "
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
