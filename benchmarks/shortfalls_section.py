"""Kernels on factors in bits beside their goals: where the time goes, and what the card would allow."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import geometric_mean

from conditions import RESULTS, machine
from decode_section import FILE as DECODING
from layers_in_formats_section import FILE as LAYERS
from layers_in_formats_section import of_least_rank
from packed_section import us

from hf_blr.bench.peaks import spec_of
from hf_blr.bench.report.commits import rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import blocks_of, grouped
from hf_blr.formats import FORMATS
from hf_blr.markdown import format_table
from hf_blr.ops.rules.device import H100
from hf_blr.ops.rules.packed import PER_WORD, places_config
from hf_blr.roofline.devices import DEVICES, Peaks
from hf_blr.roofline.stage import Stage
from hf_blr.roofline.stages import stored_stages

MEASURED, FLOOR = DEVICES["H200-measured"], DEVICES["H200"]
#: {(variant, texts): speed over dense in 16 bits}
DECODING_GOALS = {("low_rank/int4+fused", 1): 3.0, ("low_rank/fp8+fused", 1): 2.5}
#: {(structure, blocks, tokens): (speed over dense in 16 bits, over dense in float8)} of layers in fp8
LAYER_GOALS: dict[tuple[str, str, int], tuple[float, float | None]] = {
    (structure, blocks, tokens): goal
    for structure, blocks in (("low_rank", "1 x 1"), ("monarch", "4 x 4"))
    for tokens, goal in ((4096, (2.7, 1.6)), (1024, (2.0, 1.25)))
} | {
    ("blast", "4 x 4", 4096): (2.2, None),
    ("blast", "4 x 4", 1024): (1.5, None),
    ("blast", "16 x 16", 4096): (1.4, None),
    ("blast", "16 x 16", 1024): (1.1, None),
}
#: of layers in int4 at 16 tokens, and of a training step in float8, over dense in 16 bits
SIXTEEN_GOAL, TRAINING_GOAL = 2.5, 2.0
#: gate and up of Llama-3-8B's shape at half: rows, numbers of a row
GATE = 14336, 1584


def decoding_section() -> str:
    """A token of whole models: parts of it, and what it would be if packed factors cost bytes and starts alone."""
    result = read_result(RESULTS / DECODING)
    rows = rows_of(result)
    dense = {row["batch"]: row for row in rows if row["variant"] == "dense"}
    lines = []
    for row in sorted(rows, key=lambda row: (row["batch"], row["graph_ms"])):
        if not row["variant"].startswith("low_rank/"):
            continue
        texts, parts, before = row["batch"], row["profile"]["parts"], dense[row["batch"]]
        elsewhere = before["weight_bytes"] - 2 * before["projection_parameters"]
        launches = sum(kernel["calls"] for kernel in row["profile"]["kernels"] if kernel["part"] == "blr")
        read = (row["weight_bytes"] - elsewhere) / MEASURED.bandwidth * 1e3
        starts = launches * MEASURED.kernel_seconds * 1e3
        least = row["graph_ms"] - parts["blr"] + read + starts
        goal = DECODING_GOALS.get((row["variant"], texts))
        lines.append(
            {
                "factors, texts": f"{row['variant'].partition('/')[2].partition('+')[0]}, {texts}",
                "over dense": f"{before['graph_ms'] / row['graph_ms']:.2f}x",
                "goal": "" if goal is None else f"{goal}x",
                "projections, ms": f"{parts['blr']:.2f}",
                "their bytes": f"{read:.2f}",
                "their starts": f"{starts:.2f} ({launches:.0f})",
                "attention": f"{parts['attention']:.2f}",
                "head": f"{parts['products']:.2f}",
                "norms and the rest": f"{parts['elementwise']:.2f}",
                "over dense by bytes and starts": f"{before['graph_ms'] / least:.2f}x",
            }
        )
    config = places_config(GATE[1], 2 * GATE[0], 2, 16, PER_WORD["fp8"], 2, H100)
    programs, warps = -(-GATE[0] // (16 * config.tiles)), 2 * config.parts
    return (
        f"{format_table(lines)}\n\nms of a decoding step of {next(iter(dense.values()))['model']}; bytes at "
        f"{MEASURED.bandwidth / 1e12} TB/s, starts of {MEASURED.kernel_seconds * 1e6} us. The last stage of gate and "
        f"up in fp8 has {programs} programs of {warps} warps at 16 texts, on {H100.sms} multiprocessors. "
        f"{sixteen_tokens()}{machine(result['environment'])}."
    )


def sixteen_tokens() -> str:
    rows = [row for row in read_result(RESULTS / "packed_decode_h200.json")["rows"] if row["tokens"] == 16]
    dense = {(r["in_features"], r["out_features"]): us(r) for r in rows if r["format"] == "plain" and r["rank"] is None}
    found = [r for r in rows if r["format"] == "int4" and r["group"] and r["rank"]]
    speeds = [dense[r["in_features"], r["out_features"]] / us(r) for r in found]
    least = [dense[r["in_features"], r["out_features"]] / least_us(r) for r in found]
    return (
        f"Single layers at 16 tokens in int4, groups of {found[0]['group']}: {min(speeds):.2f} to {max(speeds):.2f} of "
        f"dense (goal {SIXTEEN_GOAL}), by bytes and starts {min(least):.2f} to {max(least):.2f}. "
    )


def least_us(row: dict) -> float:
    """us of a layer in int4 with groups whose kernels read codes and scales at the measured rate, and start."""
    k, n, rank, group = (row[name] for name in ("in_features", "out_features", "rank", "group"))
    numbers = rank * (k + n)
    config = places_config(k, rank, 1, row["tokens"], PER_WORD["int4"], 2, H100, group)
    # long rows are added by one kernel more
    launches = 2 + (config.splits > 1)
    return ((numbers / 2 + 2 * numbers / group) / MEASURED.bandwidth + launches * MEASURED.kernel_seconds) * 1e6


def layers_section() -> str:
    """Layers in fp8 at many tokens, in geometric means: what starts take, and what the datasheet's peaks allow."""
    result = read_result(RESULTS / LAYERS)
    rows = [row for row in rows_of(result) if row["format"] == "fp8" and row["impl"] == "hf_blr"]
    groups = grouped(rows, lambda row: (row["structure"], blocks_of(row), row["tokens"]))
    lines = []
    for (structure, blocks, tokens), (goal, beside) in LAYER_GOALS.items():
        found = of_least_rank(groups[structure, blocks, tokens])
        found = [r for r in found if beside or r["in_features"] == r["out_features"]]
        kernels = [kernels_of(row) for row in found]
        peaks = geometric_mean(
            row["dense_us"] / seconds(of, FLOOR) / 1e6 for row, of in zip(found, kernels, strict=True)
        )
        starts = sum(stage.seconds(MEASURED) - max(stage.bounds(MEASURED).values()) for of in kernels for stage in of)
        lines.append(
            {
                "structure": structure,
                "blocks": blocks,
                "tokens": str(tokens),
                "over dense": speed(found, "dense_us", goal),
                "over dense in float8": speed(found, "dense_fp8_us", beside),
                "kernels": str(len(kernels[0])),
                "starts": f"{100 * starts / sum(seconds(of, MEASURED) for of in kernels):.0f} %",
                "over dense by peaks": f"{peaks:.2f}x",
            }
        )
    steps = [row for row in rows_of(read_result(RESULTS / "float8_h200.json")) if row["measured"] == "training step"]
    ms = {(row["variant"], row["float8"]): row["ms"] for row in steps}
    step = ms["dense", False] / ms["low_rank", True]
    return (
        f"{format_table(lines)}\n\nMeasured, and in brackets the goal; low-rank and Monarch over the sizes of "
        "[the table](measured.md#layers-in-formats-of-fewer-bits), BLAST 4096 x 4096. "
        "Starts: of kernels, with first loads and drain, of the time that the roofline predicts. By peaks: the "
        f"datasheet's arithmetic and bandwidth, without starts. A training step in float8 is {step:.2f} of dense (goal "
        f"{TRAINING_GOAL}). {machine(result['environment'])}."
    )


def kernels_of(row: dict) -> list[Stage]:
    return stored_stages(spec_of(row), FORMATS["fp8"], row["tokens"], MEASURED)


def seconds(kernels: Iterable[Stage], device: Peaks) -> float:
    return sum(stage.seconds(device) for stage in kernels)


def speed(rows: list[dict], dense: str, goal: float | None) -> str:
    found = geometric_mean(row[dense] / row["us"] for row in rows)
    return f"{found:.2f}x" + ("" if goal is None else f" ({goal}x)")
