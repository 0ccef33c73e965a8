"""Table of a mixture's experts: times by structure and tokens, beside Transformers' own forms of dense experts."""

from __future__ import annotations

from conditions import RESULTS, machine

from hf_blr.bench.report.files import read_result
from hf_blr.markdown import format_table

#: {how: what runs}
NAMES = {
    "grouped_mm": "grouped_mm",
    "batched_mm": "batched_mm",
    "eager": "the loop (eager)",
    "kernel": "kernel for few rows",
    "sorted": "sorted, grouped_mm",
}


def experts_section() -> str:
    """us of each form, and how many times faster that is than the fastest of dense experts at as many tokens."""
    result = read_result(RESULTS / "experts_h200.json")
    dense: dict[int, float] = {}
    lines: dict[tuple, dict] = {}
    for row in result["rows"]:
        tokens = row["tokens"]
        if row["structure"] == "dense":
            dense[tokens] = min(dense.get(tokens, row["us"]), row["us"])
    for row in result["rows"]:
        blocks = "" if row["blocks"] is None else "{} x {}".format(*row["blocks"])
        key = row["structure"], blocks, row["format"], row["how"]
        head = {"structure": row["structure"], "blocks": blocks, "format": row["format"], "by": NAMES[row["how"]]}
        times = f"{dense[row['tokens']] / row['us']:.2f}x"
        lines.setdefault(key, head)[tokens_of(row["tokens"])] = f"{row['us']:.0f} us, {times}"
    columns = [tokens_of(tokens) for tokens in dense]
    table = [{**dict.fromkeys(columns, ""), **line} for line in lines.values()]
    order = ["structure", "blocks", "format", "by", *columns]
    worst = max(row["rel_error"] for row in result["rows"])
    return (
        f"{format_table([{name: line[name] for name in order} for line in table])}\n\n"
        f"us of all experts of one layer, and speed over the fastest dense form. {result['num_experts']} experts, "
        f"{result['num_experts_per_tok']} a token, hidden size {result['hidden_size']}, intermediate size "
        f"{result['moe_intermediate_size']} (Qwen3-30B-A3B), {result['ratio']:.0%} of the parameters, "
        f"{result['dtype']}; {result['protocol']}. The loop waits for the host and is timed as it is called. Errors "
        f"against float64 with the same factors are at most {worst:.1e}. {machine(result['environment'])}."
    )


def tokens_of(tokens: int) -> str:
    return f"{tokens} token" + "s" * (tokens > 1)
