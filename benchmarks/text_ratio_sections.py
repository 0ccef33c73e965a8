"""Tables of perplexities as ratios to the dense model's, over all texts and seeds that were measured."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable
from statistics import geometric_mean

from conditions import RESULTS, table_of
from runs import DENSE_REFINED, row_key

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped, label_of
from hf_blr.bench.report.quality_tables import score

#: characters of a hash that are enough to tell it from others
SHOWN_HASH = 8


def text_ratio_section(file: str = "quality_h200.json") -> str:
    """One line for each method, size and calibration set: every text's perplexity, and what their ratios come to."""
    result = read_result(RESULTS / file)
    rows = rows_of(result)
    texts = list(dict.fromkeys(row["dataset"] for row in rows))
    lines, letters = lettered_lines(rows, texts)
    columns = ["kept", "layers", "method", "fitted to", "trained on", *texts, "mean", "worst", "of dense refined"]
    table, where = table_of(lines, rows, result, columns)
    mixtures = "".join(f"Mixture {letter}: {mixture}. " for mixture, letter in letters.items())
    return f"{table}\n\n{mixtures}{conditions(result, rows)} {where}."


def lettered_lines(rows: list[dict], texts: list[str]) -> tuple[list[dict], dict[str, str]]:
    """(`ratio_lines` with a letter for each mixture that was fitted to or trained on, {mixture: its letter})."""
    lines = ratio_lines(rows, texts)
    letters = lettered(line[name] for name in ("fitted to", "training mixture") for line in lines)
    for line in lines:
        line["fitted to"] = letters.get(line["fitted to"], line["fitted to"])
        if mixture := line["training mixture"]:
            line["trained on"] += f" of {letters.get(mixture, mixture)}"
    return lines, letters


def lettered(sets: Iterable[str]) -> dict[str, str]:
    """{mixture: a letter}, in the order of the table; sets of one kind of text keep their names."""
    return dict(zip(filter(is_mixture, dict.fromkeys(sets)), string.ascii_uppercase, strict=False))


def is_mixture(calibration: str | None) -> bool:
    """Whether a calibration set, as a row or a table names it, has several parts."""
    return ", " in (calibration or "")


def ratio_lines(rows: list[dict], texts: list[str]) -> list[dict]:
    """The lines of the table, large models first; what was not scored on all texts is left out.

    A text's cell is its perplexity and the ratio to dense. "mean" is the geometric mean of the ratios of all texts,
    with half the range over the seeds; "worst" is the largest ratio. "of dense refined" divides the mean of a refined
    model by that of the dense model that was trained on the same tokens, at the rate that was best for it; see `about`.
    """
    groups = complete_groups(rows, texts)
    fair = fair_means(groups)
    lines = []
    for runs in groups:
        row = runs[0][0]
        mean = mean_of_runs(runs)
        line = {
            "kept": f"{100 * row['ratio']:.0f} %",
            "layers": label_of(row),
            "method": row["method"],
            "fitted to": described(row),
            "trained on": thousands(row["finetune_tokens"]) if row.get("finetune_tokens") else "",
            "training mixture": own_mixture(row),
            "mean": with_spread([mean_ratio(run) for run in runs]),
            "worst": f"{max(ratio(each) for run in runs for each in run):.3f}",
        }
        for i, text in enumerate(texts):
            of_text = [run[i] for run in runs]
            line[text] = (
                f"{score(geometric_mean([r['ppl'] for r in of_text]))} ({geometric_mean(map(ratio, of_text)):.2f}x)"
            )
        if row.get("finetune_tokens") and row["structure"] and (alike := fair_to(row, fair)):
            line["of dense refined"] = f"{about(row, fair)}{mean / alike:.3f}"
        measured = [each for run in runs for each in run]
        lines.append((-row["ratio"], mean, {**line, "commit": commits_of(measured)}))
    return [line for *_, line in sorted(lines, key=lambda each: each[:2])]


def complete_groups(rows: list[dict], texts: list[str]) -> list[list[list[dict]]]:
    """For each thing that was measured on all texts, and for each of its seeds, the rows in the order of the texts."""
    groups = [complete(found, texts) for found in grouped(rows, method_of).values()]
    return [runs for runs in groups if runs]


def mean_of_runs(runs: list[list[dict]]) -> float:
    """The mean ratio over the texts and seeds."""
    return geometric_mean([mean_ratio(run) for run in runs])


def fair_means(groups: list[list[list[dict]]]) -> dict[tuple, float]:
    """{what was trained on, the tokens or their mixture: the mean ratio of the dense model, at its best rate}."""
    fair: dict[tuple, float] = {}
    for runs in groups:
        row = runs[0][0]
        if row["method"].startswith(DENSE_REFINED):
            for text in (trained_on(row), mixture_trained_on(row)):
                fair[text] = min(fair.get(text, math.inf), mean_of_runs(runs))
    return fair


def fair_to(row: dict, fair: dict[tuple, float]) -> float | None:
    """The dense model's mean on the tokens of a refined row, else on its mixture; None if it was trained on neither."""
    exact = fair.get(trained_on(row))
    return exact or (fair.get(mixture_trained_on(row)) if row.get("finetune_mixture") else None)


def about(row: dict, fair: dict[tuple, float]) -> str:
    """What stands before a quotient: that the dense model's windows of the mixture were drawn anew."""
    return "" if trained_on(row) in fair else "≈ "


def complete(rows: list[dict], texts: list[str]) -> list[list[dict]]:
    """For each seed that has all texts its rows, in the order of the texts."""
    runs = []
    for of_seed in grouped(rows, lambda row: row["seed"]).values():
        found = {row["dataset"]: row for row in of_seed}
        if len(found) == len(texts):
            runs.append([found[text] for text in texts])
    return runs


def method_of(row: dict) -> tuple:
    """What a row measures, on whatever text and with whatever seed."""
    return row_key({**row, "dataset": None, "seed": None})


def trained_on(row: dict) -> tuple:
    """The tokens, each of them, and how many in all epochs; what a model was fitted to before does not matter."""
    return row.get("finetune_sha256"), row.get("finetune_tokens")


def mixture_trained_on(row: dict) -> tuple:
    """The mixture, how many tokens of it, and how many windows in a step: whichever windows were drawn."""
    return row.get("finetune_mixture"), row.get("finetune_tokens"), row.get("finetune_batch")


def described(row: dict) -> str:
    """`50 % own, 50 % web: 262 thousand tokens`; nothing for what reads no text."""
    again = f", {thousands(row['calibration_repeated'])} of them again" if row.get("calibration_repeated") else ""
    return f"{row['calibration']}: {thousands(row['calibration_tokens'])}{again}" if row["calibration"] else ""


def own_mixture(row: dict) -> str:
    """The mixture that a model was trained on, if that is another than it was fitted to."""
    mixture = row.get("finetune_mixture") if row.get("finetune_tokens") else None
    return mixture if mixture and mixture != row["calibration"] else ""


def thousands(tokens: int) -> str:
    return f"{tokens / 1000:.0f} thousand tokens"


def ratio(row: dict) -> float:
    return row["ppl"] / row["dense_ppl"]


def mean_ratio(run: list[dict]) -> float:
    """The geometric mean over the texts."""
    return geometric_mean(map(ratio, run))


def with_spread(means: list[float]) -> str:
    """`1.120`, or `1.120 ± 0.004` with half the range of several seeds."""
    spread = f" ± {(max(means) - min(means)) / 2:.3f}" if len(means) > 1 else ""
    return f"{geometric_mean(means):.3f}{spread}"


def conditions(result: dict, rows: list[dict]) -> str:
    """The model, the protocol, and which tokens were scored and fitted to."""
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    scored = {row["dataset"]: f"{thousands(row['text_tokens'])}, {row['text_sha256'][:SHOWN_HASH]}" for row in rows}
    fitted = {
        f"{described(row)}, seed {row['seed']}": row["calibration_sha256"][:SHOWN_HASH]
        for row in rows
        if row["calibration"]
    }
    hashes = f"SHA-256 of the token ids scored: {listed(scored)}; fitted to: {listed(fitted)}."
    return f"{models}; {result['protocol']}. {hashes}"


def listed(named: dict[str, str]) -> str:
    return "; ".join(f"{name} ({value})" for name, value in named.items())
