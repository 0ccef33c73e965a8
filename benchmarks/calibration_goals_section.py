"""What calibration was to reach on text of four kinds beside what was measured, and the text that is the default."""

from __future__ import annotations

from functools import partial
from statistics import fmean

from conditions import RESULTS
from text_ratio_sections import about, complete_groups, fair_means, fair_to, mean_of_runs, method_of, ratio, ratio_lines

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped, label_of
from hf_blr.markdown import format_table

FILE, SENTENCES, WRITTEN = "quality_h200.json", "sentences_h200.json", "own_text.json"
#: the heading over what each goal is of
WHAT = "mean ratio of four texts, or what else is said"
#: {kept: (mean ratio without training, refined over the dense model that was trained on the same tokens)}
GOALS = {0.9: (1.05, 1.03), 0.8: (1.10, 1.06), 0.5: (1.9, 1.4)}
#: the largest of the four ratios at 80 %, without training
WORST = 1.15
#: mean cosine of sentence embeddings, without training and refined
COSINES = 0.95, 0.98
#: what `hf-blr compress` makes where nothing is named but a size, the text that it takes, and the one before
DEFAULT = "ours", "blast", [4, 16]
TEXTS = {"own": "the model's own (the default)", "builtin": "Python's documentation"}


def goals_section() -> str:
    """A line for each goal: the best that was measured, and what it is."""
    rows = rows_of(read_result(RESULTS / FILE))
    groups = complete_groups(rows, list(dict.fromkeys(row["dataset"] for row in rows)))
    fair = fair_means(groups)
    table = []
    for kept, (untrained, trained) in GOALS.items():
        alike = [runs for runs in groups if runs[0][0]["structure"] and runs[0][0]["ratio"] == kept]
        refined = [runs for runs in alike if runs[0][0].get("finetune_tokens") and fair_to(runs[0][0], fair)]
        fitted = [runs for runs in alike if not runs[0][0].get("finetune_tokens")]
        size = f"{100 * kept:.0f} %"
        table.append(line(f"{size}, no training", untrained, fitted, mean_of_runs))
        said = partial(about, fair=fair)
        table.append(line(f"{size}, refined, over dense refined alike", trained, refined, partial(over, fair), said))
        if kept == 0.8:
            table.append(line("80 %, no training, the worst of the texts", WORST, fitted, worst))
    table += sentence_lines()
    return format_table(table)


def over(fair: dict[tuple, float], runs: list[list[dict]]) -> float:
    """The mean over that of the dense model that was trained on the same tokens."""
    return mean_of_runs(runs) / fair_to(runs[0][0], fair)


def worst(runs: list[list[dict]]) -> float:
    return max(ratio(row) for run in runs for row in run)


def line(name: str, goal: float, groups: list, measure, said=lambda row: "") -> dict:
    """The group that measures least beside the goal; `said` of its rows stands before what is measured."""
    best = min(groups, key=measure, default=None)
    first = {WHAT: name, "goal": f"{goal:g}"}
    if best is None:
        return first | {"measured": "not measured", "by": ""}
    row = best[0][0]
    return first | {"measured": f"{said(row)}{measure(best):.3f}", "by": f"{label_of(row)}, {row['method']}"}


def sentence_lines() -> list[dict]:
    """Likewise of sentence embeddings, whose cosine is to be large, on each text."""
    rows = rows_of(read_result(RESULTS / SENTENCES))
    found = []
    for goal, trained in zip(COSINES, (False, True), strict=True):
        some = [row for row in rows if bool(row.get("finetune_tokens")) == trained]
        # one method on other text, or trained longer, is another
        best = max(grouped(some, method_of).values(), key=lambda found: fmean(row["cosine"] for row in found))
        cosines = {row["dataset"]: f"{row['cosine']:.4f}" for row in best}
        name = f"{best[0]['model']}, {100 * best[0]['ratio']:.0f} %, cosine{', refined' * trained}"
        found.append(
            {
                WHAT: name,
                "goal": f"{goal:g}",
                "measured": ", ".join(cosines.values()),
                "by": f"{label_of(best[0])}, {best[0]['method']}, on {', '.join(cosines)}",
            }
        )
    return found


def default_text_section() -> str:
    """A line for each text and size of the command line's defaults, and how long the model writes."""
    result = read_result(RESULTS / FILE)
    rows = [row for row in rows_of(result) if (row["method"], row["structure"], row["blocks"]) == DEFAULT]
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    table = []
    for text, name in TEXTS.items():
        for found in ratio_lines([row for row in rows if row["calibration"] == text], names):
            tokens = found["fitted to"].removeprefix(f"{text}: ")
            table.append(
                {"text": name, "tokens": tokens, "kept": found["kept"]}
                | {each: found[each] for each in names}
                | {"mean": found["mean"]}
            )
    rows = [row for row in rows if row["calibration"] in TEXTS]
    written = read_result(RESULTS / WRITTEN)
    row = max(written["rows"], key=lambda row: row["windows"])
    tokens, at_once = row["windows"] * row["seqlen"], row["windows"] * row["texts"] // row["rounds"]
    table.sort(key=lambda line: line["kept"], reverse=True)
    return (
        f"{format_table(table)}\n\n{rows[0]['model']}, BLAST 4x16, `hf-blr compress MODEL OUT --ratio 0.8`: "
        f"perplexity, and over dense. {result['environment']['device']}, commits {commits_of(rows)}. The model wrote "
        f"{tokens / 1e6:.1f} million tokens in {row['seconds']:.0f} s, {at_once} texts at once in {row['dtype']}."
    )
