"""predict speed from sizes: arithmetic, traffic, the bound, and from how many tokens on a layer is faster than dense

Exact counts for every kernel that runs, and a device's peaks. --measure takes those of the GPU at hand, with a copy
and a product; --check compares predictions with the rows of `hf-blr bench layers` or `hf-blr bench model`.

Example: hf-blr roofline --device H100-measured --shapes 4096x4096 --blocks 4x4 4x16 --tokens 1 1024
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_blr.bench.shapes import aligned_spec
from hf_blr.cli import options, saving
from hf_blr.cli.options import block_counts as sizes
from hf_blr.markdown import format_table
from hf_blr.roofline.devices import DEVICES, Peaks
from hf_blr.roofline.stages import FORMS, bound_of, break_even, predict, stages
from hf_blr.structures import BLRSpec, structure_named, structures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--device", default="H100-measured", choices=list(DEVICES), help="whose peaks")
    device.add_argument("--measure", action="store_true", help="measure the peaks of the GPU at hand")
    parser.add_argument(
        "--shapes", nargs="+", type=sizes, default=[(4096, 4096)], metavar="KxN", help="layers, in x out features"
    )
    known = list(structures())
    parser.add_argument("--structures", nargs="+", default=known, choices=known, metavar="S", help="to compare")
    blocks = [(4, 4), (4, 16), (16, 16)]
    parser.add_argument("--blocks", nargs="+", type=sizes, default=blocks, metavar="B1xB2", help="of Monarch and BLAST")
    parser.add_argument("--ratio", type=float, default=0.5, help="kept / dense parameters")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 1024, 4096], help="rows of the input")
    parser.add_argument("--form", default="hf_blr", choices=FORMS[1:], help="the kernels that run")
    parser.add_argument("--stages", action="store_true", help="one row for each kernel")
    parser.add_argument("--check", type=Path, metavar="FILE", help="measured rows to compare with")
    options.add_json(parser)


def run(args: argparse.Namespace) -> None:
    from hf_blr.bench.model_peaks import model_predictions
    from hf_blr.bench.peaks import deviations, measure_peaks, predictions
    from hf_blr.bench.report.conditions import kind_of
    from hf_blr.bench.report.files import read_result

    device = measure_peaks(options.device_named("auto")) if args.measure else DEVICES[args.device]
    result: dict[str, Any] = {"device": asdict(device)}
    print(
        f"{device.name}: {device.flops / 1e12:.0f} TFLOP/s, {device.bandwidth / 1e9:.0f} GB/s, "
        f"{device.product_seconds * 1e6:.1f} us a product and {device.kernel_seconds * 1e6:.1f} us a kernel to start"
    )
    if args.check:
        measured = read_result(args.check)
        kind = kind_of(measured)
        if kind == "models":
            rows = model_predictions(measured["rows"], device)
            print(format_table(list(map(model_line, rows))))
        elif kind == "layers":
            rows = predictions(measured["rows"], device)
            print(format_table(deviations(rows)))
        else:
            raise ValueError(
                f"{args.check} holds no rows of hf-blr bench layers or hf-blr bench model: name one that does"
            )
        result["rows"] = rows
    else:
        specs = [spec for shape in args.shapes for spec in wanted_specs(args, *shape)]
        result["rows"] = [row for spec in specs for row in rows_of(spec, args, device)]
        print(format_table(result["rows"]))
        for spec in specs:
            print(f"{title(spec)}: {in_words(break_even(spec, device, args.form))}")
    saving.write_json(args.json, result)


def model_line(row: dict) -> dict:
    """A row of a whole model beside its prediction."""
    line = {name: row[name] for name in ("model", "variant", "measurement", "batch", "tokens")}
    times = {"predicted ms": row["predicted_ms"], "measured ms": row["measured_ms"]}
    return line | times | {"off %": 100 * row["deviation"]}


def wanted_specs(args: argparse.Namespace, k: int, n: int) -> Iterator[BLRSpec]:
    for structure in args.structures:
        for blocks in args.blocks if structure_named(structure).spec.blocked else [None]:
            yield aligned_spec(structure, k, n, args.ratio, blocks)


def rows_of(spec: BLRSpec, args: argparse.Namespace, device: Peaks) -> list[dict[str, Any]]:
    rows = []
    for tokens in args.tokens:
        kernels = stages(spec, tokens, args.form, chip=device.chip)
        groups = [(s.name, [s]) for s in kernels] if args.stages else [("", kernels)]
        dense = predict(spec, tokens, device, "dense")
        for name, group in groups:
            seconds = sum(s.seconds(device) for s in group)
            row = {"layer": title(spec), "tokens": tokens}
            if args.stages:
                row["stage"] = name
            row |= {
                "MFLOP": sum(s.flops for s in group) / 1e6,
                "MB": sum(s.bytes for s in group) / 1e6,
                "us": seconds * 1e6,
                "bound": bound_of(group, device),
            }
            rows.append(row if args.stages else {**row, "dense us": dense * 1e6, "speed-up": dense / seconds})
    return rows


def title(spec: BLRSpec) -> str:
    b1, b2 = spec.num_blocks
    return f"{spec.in_features}x{spec.out_features} {spec.structure} {b1}x{b2} rank {spec.rank}"


def in_words(changes: list[tuple[int, bool]]) -> str:
    """`faster than dense from 1 token on, not from 93, faster from 412`."""
    parts = [f"{'faster' if faster else 'slower'} than dense from {tokens} tokens on" for tokens, faster in changes]
    return ", ".join(parts)
