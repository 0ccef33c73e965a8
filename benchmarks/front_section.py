"""The one table of the README: what each structure keeps, costs and gains, of one run at one commit."""

from __future__ import annotations

import json

import conditions

from hf_blr.cli.table import format_table

#: what a table says where its result file does not exist yet
MISSING = "_(being measured)_"

#: the texts as they are written in papers
TEXTS = {"wikitext2": "WikiText-2", "ptb": "PTB"}


def front_section() -> str:
    """Size, perplexity and speed of dense and of each structure; a sentence where the file does not exist yet."""
    path = conditions.RESULTS / "front_h200.json"
    if not path.exists():
        return MISSING
    result = json.loads(path.read_text())
    models = ", ".join(dict.fromkeys(row["speed_model"] for row in result["rows"] if row.get("speed_model")))
    where = result["environment"]
    return (
        f"{format_table([front_row(row) for row in result['rows']])}\n\nPrefill and decode are those of {models}. "
        f"{result['protocol'].rstrip('.')}. {conditions.machine(where)}, transformers {where['transformers']}."
    )


def front_row(row: dict) -> dict:
    """The cells of one row, as text; a number that was not measured leaves its cell empty."""
    perplexities = {TEXTS.get(text, text): shown(ppl) for text, ppl in row["ppl"].items()}
    return {
        "": row["row"],
        "kept": f"{100 * row['kept']:.0f} %",
        "MB": f"{row['mb']:.0f}",
        **perplexities,
        "prefill, ms": shown(row.get("prefill_ms")),
        "decode, ms": shown(row.get("decode_ms")),
    }


def shown(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"
