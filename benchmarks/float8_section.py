"""What layers in fp8 took on an H200: stages, whole layers, errors."""

from __future__ import annotations

from conditions import RESULTS, machine

from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import blocks_of
from hf_blr.markdown import format_table
from hf_blr.ops.rules.device import H100
from hf_blr.ops.rules.float8 import float8_config, multiplies_by_cublas


def float8_section() -> str:
    """Stages of low-rank layers beside dense, whole layers of the other structures, and their errors."""
    result = read_result(RESULTS / "float8_h200.json")
    rows = {kind: [row for row in result["rows"] if row["measured"] == kind] for kind in ("products", "layer", "error")}
    (compiled,) = [row for row in result["rows"] if row["measured"] == "compiled"]
    dense = {(r["in_features"], r["out_features"], r["tokens"]): r["dense_us"] for r in rows["products"]}
    return (
        "Low-rank. Sums of stages are not whole layers: each stage pays a graph's start.\n\n"
        f"{format_table(list(map(stages_line, rows['products'])))}\n\n"
        "First: our kernel, and last: cuBLAS or ours, as the rules say. Dense in float8: cuBLAS with a scale a row, "
        "behind our cast.\n\n"
        "Behind a norm under torch.compile, where the cast joins the norm's kernel, norm and layer of 4096 x 4096 took "
        f"{compiled['norm_and_layer_us']:.1f} us at {compiled['tokens']} tokens, the norm alone "
        f"{compiled['norm_us']:.1f}; the last stage was ours.\n\n"
        "Whole layers of 4096 x 4096, cast included, with one size of tiles for both stages:\n\n"
        f"{format_table([layer_line(row, dense) for row in rows['layer']])}\n\n"
        "Pivoted's last stage was ours then, and is cuBLAS' since; layers of 16 x 16 blocks become numbers since.\n\n"
        f"{format_table([error_line(row) for row in rows['error'] if row['tokens'] > 48])}\n\n"
        f"{result['dtype']}, {result['protocol']}. {machine(result['environment'])}."
    )


def stages_line(row: dict) -> dict:
    tokens, rank, k = row["tokens"], row["rank"], row["in_features"]
    n = row["out_features"]
    by_cublas = multiplies_by_cublas(tokens, n, True, False, H100)
    last = "cublas, row scales" if by_cublas else tiles(tokens, n, rank)
    parts = [row["cast_us"], row["first_us"][tiles(tokens, rank, k)], row["last_us"][last]]
    rival = [row["cast_us"], row["dense_fp8_product_us"]]
    return {
        "in x out, rank": f"{k} x {n}, {rank}",
        "tokens": tokens,
        "dense us": f"{row['dense_us']:.1f}",
        "dense float8: cast + product": in_sum(rival),
        "cast + first + last": in_sum(parts),
        "dense / sum": f"{row['dense_us'] / sum(parts):.2f}",
        "dense float8 / sum": f"{sum(rival) / sum(parts):.2f}",
    }


def tiles(tokens: int, n: int, k: int) -> str:
    """What the rule takes, as the file names it."""
    config = float8_config(tokens, n, k, 1, H100)
    return f"{config.bt} x {config.outputs}, {config.warps} warps, {config.stages} stages" + ", staying" * (
        config.stays > 0
    )


def in_sum(parts: list[float]) -> str:
    return f"{' + '.join(f'{part:.1f}' for part in parts)} = {sum(parts):.1f}"


def layer_line(row: dict, dense: dict) -> dict:
    """With the fastest of the tiles that were tried."""
    tiles, us = min(row["us_by_tiles"].items(), key=lambda pair: pair[1])
    before = dense[row["in_features"], row["out_features"], row["tokens"]]
    return {
        "structure": row["structure"],
        "blocks": blocks_of(row),
        "tokens": row["tokens"],
        "dense us": f"{before:.1f}",
        "us": f"{us:.1f}",
        "tiles": tiles,
        "others": f"to {max(row['us_by_tiles'].values()):.1f}",
        "speed": f"{before / us:.2f}x",
    }


def error_line(row: dict) -> dict:
    return {
        "structure": row["structure"],
        "blocks": blocks_of(row),
        "rank": row["rank"],
        "error of the output": f"{row['rel_error']:.4f}",
        "of a token with a massive activation": f"{row['rel_error_massive_activation']:.4f}",
    }
