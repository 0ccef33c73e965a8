"""The rows of README's table: perplexity and size of a small real model, speed of a Llama-sized one, in one run.

    python benchmarks/front.py --model FOLDER --gguf-file NAME --ids ids.pt --json results/front_h200.json

Every row keeps its share of the projections; `front_section.py` prints the table.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from calibration_sets import Calibration, Mixture
from int4_dense import BITS, rounded_model
from protocol import SEQLEN, WINDOWS, Bench, read_ids
from torch import nn

from hf_blr import BLRConfig, compress
from hf_blr.bench import generation, measure
from hf_blr.bench.environment import environment
from hf_blr.bench.forms import forget_compiled
from hf_blr.bench.models import SHAPES, Shape
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.shapes import aligned_spec, typical_indices
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant, build_model, default_dtype
from hf_blr.cli import loading, options
from hf_blr.dense import feature_sizes
from hf_blr.inference import fuse
from hf_blr.integration import record_plan, swap_in
from hf_blr.plan import LayerPlan, plan_from_layers, resolve_plan

SPEED_MODEL, TOKENS, PROMPT, NEW_TOKENS = "Llama-3-8B", 1024, 128, 64
PROTOCOL = (
    "MB and perplexity: SmolLM2-135M-Instruct, bytes in bfloat16, non-overlapping windows of 2048 of the whole text, "
    "fitted to 128 windows of WikiText-2 validation; the 4-bit row is GPTQ in groups of 64 on weights rotated off "
    "the grid of the file that they come from. Speed: random weights, one text, prefill of 1024 tokens with the "
    "logits of the last, decoding one token on a static cache as a CUDA graph's replay, blocks under torch.compile; "
    "dense in the faster of modes default and max-autotune, 4-bit decoding by PyTorch's int4 kernel and prefill by "
    "dequantising; auto: the structures and shares that each kind of projection got in the small model"
)


@dataclass(frozen=True)
class Row:
    """One line of the table; `structure` is "dense", "int4", "auto" or a structure's name."""

    name: str
    structure: str
    blocks: tuple[int, int] | None = None


ROWS = (
    Row("dense", "dense"),
    Row("dense, 4-bit", "int4"),
    Row("low-rank", "low_rank"),
    Row("BLAST 4x4", "blast", (4, 4)),
    Row("BLAST 16x16", "blast", (16, 16)),
    Row("pivoted", "pivoted"),
    Row("auto", "auto"),
)


def quality(bench: Bench, on: Calibration, row: Row, kept: float) -> dict:
    """{"mb", "ppl"}, and for "auto" the "kinds" of its plan."""
    if row.structure == "dense":
        return {"mb": 2e-6 * parameters(bench.dense), "ppl": bench.dense_ppl}
    if row.structure == "int4":
        model, count = rounded_model(bench.dense, on.statistics.grams)
        return {"mb": 2e-6 * (parameters(bench.dense) - count) + BITS / 8e6 * count, "ppl": bench.score(model)}
    model = copy.deepcopy(bench.dense)
    config = BLRConfig(row.structure, ratio=kept, num_blocks=row.blocks)
    report = compress(model, config, calibration=on.batches, statistics=on.statistics, progress=False)
    found = {"mb": 2e-6 * parameters(model), "ppl": bench.score(model), "fit_seconds": report.seconds}
    if row.structure == "auto":
        targets = resolve_plan(bench.dense, BLRConfig(ratio=kept))
        found["kinds"] = kinds_of(plan_from_layers(model.config.quantization_config.layers), targets)
    return found


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kinds_of(plan: dict[str, LayerPlan], targets: dict[str, LayerPlan]) -> dict[str, list]:
    """{ending of a name: [most frequent structure, its blocks, mean share kept]}; dense layers keep all."""
    groups: dict[str, list[LayerPlan | None]] = {}
    for name in targets:
        groups.setdefault(name.rpartition(".")[2], []).append(plan.get(name))
    found = {}
    for kind, layers in groups.items():
        forms = Counter(("dense", (1, 1)) if p is None else (p.spec.structure, p.spec.num_blocks) for p in layers)
        (structure, blocks), _ = forms.most_common(1)[0]
        found[kind] = [structure, list(blocks), sum(1.0 if p is None else p.spec.ratio for p in layers) / len(layers)]
    return found


def build(row: Row, kept: float, kinds: dict | None, shape: Shape, device: str) -> nn.Module:
    """The Llama-sized model of a row, with random weights, as it is run."""
    if row.structure in ("dense", "int4"):
        variant = Variant.parse("dense/int4, PyTorch" if row.structure == "int4" else "dense+attention")
        return build_model(shape, variant, kept, device, torch.bfloat16)
    if row.structure != "auto":
        # where no kernels run several layers together, fuse still gives the model its attention
        model = build_model(shape, Variant(row.structure, blocks=row.blocks), kept, device, torch.bfloat16)
        fuse(model)
        return model
    assert kinds is not None
    with torch.device(device), default_dtype(torch.bfloat16):
        model = shape.build().eval()
        plan = {}
        for name, layer in resolve_plan(model, BLRConfig(ratio=kept)).items():
            structure, blocks, share = kinds[name.rpartition(".")[2]]
            if structure != "dense":
                sizes = feature_sizes(model.get_submodule(name))
                spec = aligned_spec(structure, *sizes, share, tuple(blocks) if tuple(blocks) != (1, 1) else None)
                plan[name] = replace(layer, spec=spec)
        for module in swap_in(model, plan).values():
            for name, index in typical_indices(module.spec, device).items():
                module.indices()[name].copy_(index)
    fuse(model)
    record_plan(model, BLRConfig(ratio=kept), plan)
    return model


def speed(row: Row, kept: float, kinds: dict | None, shape: Shape, timer: Timer, modes: tuple[str, ...]) -> dict:
    """{"prefill_ms", "decode_ms"}, each the fastest of the modes of torch.compile."""
    found: dict[str, float] = {}
    for mode in modes:
        forget_compiled()
        gc.collect()
        model = build(row, kept, kinds, shape, str(timer.device))
        prefill = measure.prefill(model, "text", 1, TOKENS, "compiled", mode, timer)["ms"]
        decoded = generation.decode(model, 1, PROMPT, NEW_TOKENS, "compiled", mode, timer.device)
        for name, ms in (("prefill_ms", prefill), ("decode_ms", decoded.get("graph_ms", decoded["ms"]))):
            found[name] = min(ms, found.get(name, ms))
        model = None
    return found


def modes_of(row: Row) -> tuple[str, ...]:
    return ("default", "max-autotune") if row.structure == "dense" else ("default",)


def compile_once(row: Row, kept: float, kinds: dict | None, device: str) -> None:
    """What `speed` compiles, on two blocks, for the caches on disk."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    speed(row, kept, kinds, shallow(SHAPES[SPEED_MODEL]), Timer(device, 0.0), ("default",))


def shallow(shape: Shape) -> Shape:
    return replace(shape, build=partial(shape.build, num_hidden_layers=2))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    options.add_loading(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--ids", type=Path, required=True, help="a torch file {valid: ids, wikitext2: ids, ptb: ids}")
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS], help="names of rows")
    parser.add_argument("--no-speed", action="store_true", help="sizes and perplexities alone")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile first")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    dense, _ = loading.load_model(args.model, args, reader=False)
    name = Path(args.gguf_file or args.model).name.partition(".Q")[0]
    texts = read_ids([str(args.ids)], None)
    valid = {"valid": texts.pop("valid")}
    on = Calibration.draw(dense.eval(), valid, Mixture.parse(["valid"]), 0, WINDOWS, SEQLEN)
    bench = Bench(name, dense, texts)
    machine = environment()
    head = {"environment": {**machine, "commit": args.commit or machine["commit"]}, "protocol": PROTOCOL}
    rows = [row for row in ROWS if row.name in args.rows]
    cells = [(row, 1.0) for row in rows if row.structure in ("dense", "int4")]
    cells += [(row, kept) for kept in args.kept for row in rows if row.structure not in ("dense", "int4")]
    measured = {}
    for row, kept in cells:
        measured[row, kept] = quality(bench, on, row, kept)
        print(f"{row.name} {kept}: {measured[row, kept]}", flush=True)
    file, timer = ResultFile(args.json, head), Timer(args.device)
    if args.no_speed:
        file.add([{"row": row.name, "kept": kept, **found} for (row, kept), found in measured.items()])
        return
    bench = on = dense = None
    gc.collect()
    kinds = {key: found.get("kinds") for key, found in measured.items()}
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(compile_once, row, kept, kinds[row, kept], args.device) for row, kept in cells]
        for job in running:
            job.result()
    for row, kept in cells:
        times = speed(row, kept, kinds[row, kept], SHAPES[SPEED_MODEL], timer, modes_of(row))
        file.add([{"row": row.name, "kept": kept, "speed_model": SPEED_MODEL, **measured[row, kept], **times}])
        print(f"{row.name} {kept}: {times}", flush=True)


if __name__ == "__main__":
    main()
