"""Other papers' methods beside ours on the same windows, text by text."""

from __future__ import annotations

from statistics import geometric_mean

from conditions import RESULTS
from text_ratio_sections import complete_groups, described, mean_of_runs, mean_ratio, ratio, with_spread

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import label_of
from hf_blr.markdown import format_table

FILE = "quality_h200.json"
#: what all were fitted to
FITTED_TO = "20 % code, 25 % mixed, 30 % own, 25 % valid", 262144
#: ours that is compared, and what the papers' methods are called in rows: {method: its name}
OURS = "ours"
PAPERS = {
    "MoDeGPT at 0.1": "MoDeGPT",
    "SVD-LLM with update": "SVD-LLM",
    "AA-SVD, 5 passes": "AA-SVD",
    "whitened SVD": "whitened SVD",
}
STRUCTURE = "pivoted"
KEPT = (0.8, 0.5)


def other_methods_section() -> str:
    """A line for each method and size, then of each size whether ours loses less on every text."""
    result = read_result(RESULTS / FILE)
    fitted = [
        row for row in rows_of(result) if (row["calibration"], row["calibration_tokens"]) == FITTED_TO and compared(row)
    ]
    texts = list(dict.fromkeys(row["dataset"] for row in fitted))
    table, said, used = [], [], []
    for kept in KEPT:
        found = complete_groups([row for row in fitted if row["ratio"] == kept], texts)
        found.sort(key=mean_of_runs)
        table += [line(runs, texts) for runs in found]
        used += [row for runs in found for run in runs for row in run]
        ours = [run for runs in found for run in runs if run[0]["method"] == OURS]
        others = [run for runs in found for run in runs if run[0]["method"] != OURS]
        said += [verdict(kept, mine, run) for mine in ours for run in others if run[0]["seed"] == mine[0]["seed"]]
    said = list(dict.fromkeys(said))
    where = f"{used[0]['model']}, fitted to {described(used[0])}; perplexity over the dense model's, the mean geometric"
    about = f"{where}. {result['environment']['device']}, commits {commits_of(used)}."
    return "\n\n".join([format_table(table), "\n".join(f"- {each}" for each in said), about])


def compared(row: dict) -> bool:
    """Whether it is ours as pivoted, or a paper's; none of them trained."""
    ours = row["method"] == OURS and row["structure"] == STRUCTURE
    return (ours or row["method"] in PAPERS) and not row.get("finetune_tokens")


def line(runs: list[list[dict]], texts: list[str]) -> dict:
    row = runs[0][0]
    return {
        "kept": f"{100 * row['ratio']:.0f} %",
        "layers": label_of(row),
        "method": PAPERS.get(row["method"], row["method"]),
        **{text: f"{geometric_mean(ratio(run[i]) for run in runs):.2f}x" for i, text in enumerate(texts)},
        "mean": with_spread([mean_ratio(run) for run in runs]),
    }


def verdict(kept: float, ours: list[dict], other: list[dict]) -> str:
    """What the other one loses on each text as a multiple of what ours loses, or where it loses no more."""
    name, size = PAPERS[other[0]["method"]], f"At {100 * kept:.0f} %"
    pairs = list(zip(ours, other, strict=True))
    better = [row["dataset"] for mine, row in pairs if row["ppl"] <= mine["ppl"]]
    if better:
        return f"{size} {name} loses no more than ours on {', '.join(better)}."
    times = sorted((ratio(row) - 1) / (ratio(mine) - 1) for mine, row in pairs)
    return f"{size} {name} loses more on every text: {times[0]:.1f} to {times[-1]:.1f} times what ours loses."
