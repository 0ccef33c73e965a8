"""The one table of the README: what each structure keeps, costs and gains, of one run at one commit."""

from __future__ import annotations

import json
from typing import Any

import conditions

from hf_blr.markdown import format_table


def front_section() -> str:
    """Size, perplexity and speed of dense, of four bits and of each structure, at each share that was kept."""
    result = json.loads((conditions.RESULTS / "front_h200.json").read_text())
    rows: list[dict[str, Any]] = result["rows"]
    (dense,) = [row for row in rows if row["row"] == "dense"]
    shares = sorted({row["kept"] for row in rows}, reverse=True)
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        # dense and four bits keep all of the projections: they stand beside the first share
        share = max(share for share in shares if share < 1) if row["kept"] == 1 else row["kept"]
        lines.setdefault(row["row"], {"": row["row"]}).update(cells(row, dense, f"{100 * share:.0f} %: "))
    columns = list(dict.fromkeys(column for line in lines.values() for column in line))
    (speed_model,) = {row["speed_model"] for row in rows}
    where = result["environment"]
    table = format_table(list(lines.values()), columns)
    return (
        f"{table}\n\nEach structure with 80 % and with 50 % of the projections kept. "
        f"Perplexity: WikiText-2 / PTB. Prefill and decode: {speed_model}, dense {dense['prefill_ms']:.1f} ms and "
        f"{dense['decode_ms']:.2f} ms. {conditions.machine(where)}, transformers {where['transformers']}. "
        "[Protocol](docs/measured.md#the-table-of-the-readme)."
    )


def cells(row: dict[str, Any], dense: dict[str, Any], share: str) -> dict[str, str]:
    """One row's numbers under the heading of the share that it keeps."""
    speeds = " / ".join(f"{dense[name] / row[name]:.2f}x" for name in ("prefill_ms", "decode_ms"))
    return {
        f"{share}MB": f"{row['mb']:.0f}",
        f"{share}perplexity": " / ".join(shown(ppl) for ppl in row["ppl"].values()),
        f"{share}prefill / decode": speeds,
    }


def shown(ppl: float) -> str:
    return f"{ppl:.1f}" if ppl < 100 else f"{ppl:.0f}"


def protocol_section() -> str:
    """How the front table was measured, with the milliseconds behind it."""
    result = json.loads((conditions.RESULTS / "front_h200.json").read_text())
    table = [
        {
            "": row["row"],
            "kept": f"{100 * row['kept']:.0f} %",
            "MB": f"{row['mb']:.1f}",
            "WikiText-2": f"{row['ppl']['wikitext2']:.2f}",
            "PTB": f"{row['ppl']['ptb']:.2f}",
            "fit, s": f"{row['fit_seconds']:.0f}" if "fit_seconds" in row else "",
            "prefill, ms": f"{row['prefill_ms']:.2f}",
            "decode, ms": f"{row['decode_ms']:.2f}",
        }
        for row in result["rows"]
    ]
    return f"{format_table(table)}\n\n{result['protocol']}. {conditions.machine(result['environment'])}."
