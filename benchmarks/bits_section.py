"""Accuracy at equal bytes: one line for each structure and format, by the bits that a weight takes."""

from __future__ import annotations

from statistics import geometric_mean
from typing import Any

from conditions import RESULTS, table_of
from protocol import TURNED
from runs_in_bits import COLUMNS
from text_ratio_sections import (
    complete,
    conditions,
    described,
    is_mixture,
    lettered,
    mean_ratio,
    method_of,
    own_mixture,
    ratio,
    thousands,
)

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped, label_of
from hf_blr.bench.report.quality_tables import score, stored_in
from hf_blr.markdown import format_table

FILE = "bits_h200.json"

#: {bits: goals of a fit and of a refined model}; {format: what 80 % in low-rank factors may lose by it, in percent,
#: likewise}
BUDGETS = {4.25: (18.8, 18.2), 3.5: (20.0, 18.6), 3.25: (22.0, 19.5), 2.25: (45.0, 28.0)}
FACTORS = {"int8": (0.3, 0.1), "fp8": (1.5, 0.5), "int4": (6.0, 3.0)}
UNKNOWN = "not measured"
#: bytes that a GGUF file keeps for 256 numbers, of each K-quant (`block_q6_K` and so on in ggml)
K_QUANTS, K_BLOCK = {"Q6_K": 210, "Q5_K": 176, "Q4_K": 144, "Q3_K": 110, "Q2_K": 84}, 256

#: {column: whether its models are refined}
MEANS = {"as fitted": False, "refined": True}

Line = dict[str, Any]


def bits_section() -> str:
    """Every method on the model that lies on no file's grid, fitted to text of one kind: those of most bits first."""
    result = read_result(RESULTS / FILE)
    rows = rows_on(result, mixtures=False)
    texts = texts_of(rows)
    lines = sorted(bits_lines(rows, texts), key=lambda line: (-line["bits"], line["mean"]))
    # where all read the same, what is below the table says it
    fitted = ["fitted to"] if len({line["fitted to"] for line in lines} - {""}) > 1 else []
    columns = ["bits", "layers", "kept", "stored in", "method", *fitted, "trained on", *texts, "mean"]
    table, where = table_of([shown(line) for line in lines], rows, result, columns)
    return f"{table}\n\n{conditions(result, rows)} {where}."


def best_section() -> str:
    """What no form of no more bits is better than, as fitted or refined: each form of the layers with both means."""
    rows = rows_on(read_result(RESULTS / FILE), mixtures=False)
    forms = grouped(bits_lines(rows, texts_of(rows)), lambda line: (f"{line['bits']:.2f}", worded(line, bits=False)))
    table = [{"bits": float(bits), "layers": layers} | means(found) for (bits, layers), found in forms.items()]

    def is_best(form: Line, head: str) -> bool:
        return head in form and not any(
            other["bits"] <= form["bits"] and other.get(head, form[head]) < form[head] for other in table
        )

    kept = [form for form in table if any(is_best(form, head) for head in MEANS)]
    return format_table(
        [
            {"bits": f"{form['bits']:.2f}", "of 16": f"{100 * form['bits'] / 16:.0f} %", "layers": form["layers"]}
            | {head: f"{form[head]:.3f}" if head in form else "" for head in MEANS}
            for form in sorted(kept, key=lambda form: -form["bits"])
        ]
    )


def means(lines: list[Line]) -> dict[str, float]:
    """The least mean of lines that are as fitted, and of those that are refined, where there are any."""
    found = {}
    for head, trained in MEANS.items():
        of_head = [line["mean"] for line in lines if line["method"].endswith("refined") == trained]
        found |= {head: min(of_head)} if of_head else {}
    return found


def mixture_section() -> str:
    """Likewise of what is fitted to a mixture, beside the dense model. Every row says the mixture in a letter."""
    result = read_result(RESULTS / FILE)
    rows = rows_on(result, mixtures=True)
    texts = texts_of(rows)
    lines = sorted(bits_lines(rows, texts), key=lambda line: (-line["bits"], line["mean"]))
    letters = lettered(line[name] for name in ("fitted to", "training mixture") for line in lines)
    for line in lines:
        line["fitted to"] = letters.get(line["fitted to"], line["fitted to"])
        if mixture := line["training mixture"]:
            line["trained on"] += f" of {letters.get(mixture, mixture)}"
    columns = ["bits", "layers", "kept", "stored in", "method", "fitted to", "trained on", *texts, "mean"]
    table, where = table_of([shown(line) for line in lines], rows, result, columns)
    named = "".join(f"Mixture {letter}: {mixture}. " for mixture, letter in letters.items())
    return f"{table}\n\n{named}{where}."


def k_quants_section() -> str:
    """Beside the size of each K-quant the best of ours that stores no more, as fitted and refined."""
    result = read_result(RESULTS / FILE)
    rows = rows_on(result, mixtures=False)
    lines = [line for line in bits_lines(rows, texts_of(rows)) if line["method"] != ""]
    table = []
    for name, size in K_QUANTS.items():
        bits = 8 * size / K_BLOCK
        within = [line for line in lines if line["bits"] <= bits]
        cells = {"K-quant": name, "bits": f"{bits:.2f}"}
        for head, trained in (("best fit of no more bits", False), ("best refined of no more bits", True)):
            found = [line for line in within if line["method"].endswith("refined") == trained]
            best = min(found, key=lambda line: line["mean"], default=None)
            cells[head] = UNKNOWN if best is None else worded(best)
        table.append(cells)
    return format_table(table)


def worded(line: Line, bits: bool = True) -> str:
    kept = "" if line["kept"] == "100 %" or line["layers"] == "auto" else f" {line['kept']}"
    stored = "" if line["layers"] == "auto" or line["method"] == "" else f" in {line['stored in']}"
    stored += f", {line['method']}" if "torchao" in line["method"] else ""
    said = f", {line['bits']:.2f} bits, mean {line['mean']:.3f}" if bits else ""
    return f"{line['layers']}{kept}{stored}{said}"


def goals_section() -> str:
    """What was aimed at on WikiText-2, by models that are fitted to its validation part, beside what was measured."""
    rows = [row for row in read_result(RESULTS / FILE)["rows"] if turned(row) and row["dataset"] == "wikitext2"]
    found: dict[tuple, dict[str | None, float]] = {}
    for row in rows:
        if row["calibration"] == "valid" and row["method"] != COLUMNS:
            trained = row.get("finetune_tokens", 0) > 0
            key = row["structure"], row["ratio"], row.get("bits_per_weight") or row["format"], trained
            # the best way to train it on these tokens
            on = found.setdefault(key, {})
            text = row.get("finetune_sha256")
            on[text] = min(row["ppl"], on.get(text, row["ppl"]))
    whole = {4.25: "int4", 3.25: "int3"}
    table = []
    for bits, goals in BUDGETS.items():
        for goal, trained in zip(goals, (False, True), strict=True):
            measured = found.get(("auto", 1.0, bits, trained), {})
            text = min(measured, key=lambda text: measured[text], default=None)
            # refined on the same text, if it is
            rival = found.get(("dense", 1.0, whole.get(bits), trained), {}).get(text)
            beside = f" (GPTQ{', refined' * trained} {score(rival)})" if rival else ""
            name = f"auto, {bits:g} bits{', refined' * trained}"
            table.append((name, f"{goal:g}", f"{score(measured[text])}{beside}" if measured else UNKNOWN))
    for name, goals in FACTORS.items():
        for most, trained in zip(goals, (False, True), strict=True):
            plain, measured = (found.get(("low_rank", 0.8, each, trained), {}) for each in ("plain", name))
            # what was trained on other text says nothing
            shares = [ppl / plain[text] for text, ppl in measured.items() if text in plain]
            known = f"{100 * (min(shares) - 1):.1f} %" if shares else UNKNOWN
            table.append((f"low-rank 80 % in {name}, over plain{', refined' * trained}", f"at most {most:g} %", known))
    return format_table([dict(zip(("perplexity", "goal", "measured"), row, strict=True)) for row in table])


def turned(row: dict) -> bool:
    return row["model"].endswith(TURNED)


def rows_on(result: dict, mixtures: bool) -> list[dict]:
    """The turned model's rows that are fitted to mixtures or are not, and in both cases those that read no text."""
    rows = [row for row in rows_of(result) if turned(row)]
    if mixtures:
        return [row for row in rows if row["method"] == "dense" or is_mixture(row["calibration"])]
    return [row for row in rows if not is_mixture(row["calibration"])]


def texts_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["dataset"] for row in rows))


def bits_lines(rows: list[dict], texts: list[str]) -> list[Line]:
    """A line for each method and calibration set that was scored on all texts: each perplexity, and its ratio to dense.

    "mean" is the geometric mean of the ratios.
    """
    lines = []
    for found in grouped(rows, method_of).values():
        runs = complete(found, texts)
        if not runs:
            continue
        row = runs[0][0]
        line: Line = {
            "bits": row["bits"],
            "layers": label_of(row) or "dense",
            "kept": f"{100 * row['kept']:.0f} %",
            "stored in": stored_in(row),
            "method": "" if row["method"] == "dense" else row["method"],
            "fitted to": described(row),
            "trained on": thousands(row["finetune_tokens"]) if row.get("finetune_tokens") else "",
            "training mixture": own_mixture(row),
            "mean": geometric_mean([mean_ratio(run) for run in runs]),
            "commit": commits_of([each for run in runs for each in run]),
        }
        for i, text in enumerate(texts):
            of_text = [run[i] for run in runs]
            ppl = geometric_mean([each["ppl"] for each in of_text])
            line[text] = f"{score(ppl)} ({geometric_mean(map(ratio, of_text)):.2f}x)"
        lines.append(line)
    return lines


def shown(line: Line) -> Line:
    return line | {"bits": f"{line['bits']:.2f}", "mean": f"{line['mean']:.3f}"}
