"""What int4 costs each structure."""

from __future__ import annotations

from statistics import geometric_mean

from bits_section import FILE, UNKNOWN, rows_on, texts_of
from conditions import RESULTS
from runs import OURS
from text_ratio_sections import method_of

from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped, label_of
from hf_blr.formats import PLAIN
from hf_blr.markdown import format_table


def structures_section() -> str:
    """What int4 costs each structure, as fitted: its perplexity over that of the same structure with plain factors.

    "over low-rank" is the mean over the texts of its perplexity over that of low-rank in int4.
    """
    fits = [row for row in rows_on(read_result(RESULTS / FILE), mixtures=False) if row["method"] == OURS]
    fits = [row for row in fits if row["ratio"] < 1]
    texts, table = texts_of(fits), []
    in_int4 = list(grouped([row for row in fits if row["format"] == "int4"], method_of).values())
    low_rank = {row["dataset"]: row["ppl"] for found in in_int4 for row in found if row["structure"] == "low_rank"}
    for found in in_int4:
        row = found[0]
        plain = {
            each["dataset"]: each["ppl"]
            for each in fits
            if each["format"] == PLAIN.name and same_fit(each) == same_fit(row)
        }
        ratios = {each["dataset"]: each["ppl"] / plain[each["dataset"]] for each in found if each["dataset"] in plain}
        cells = {text: f"{ratios[text]:.3f}" if text in ratios else UNKNOWN for text in texts}
        bits = {"layers": label_of(row), "kept": f"{100 * row['ratio']:.0f} %", "bits": f"{row['bits']:.2f}"}
        over = [each["ppl"] / low_rank[each["dataset"]] for each in found if each["dataset"] in low_rank]
        beside = {"over low-rank": f"{geometric_mean(over):.3f}" if over else UNKNOWN}
        table.append(bits | {"group": str(row["group_size"])} | cells | beside)
    return format_table(sorted(table, key=lambda line: line["bits"]))


def same_fit(row: dict) -> tuple:
    """What two rows share that differ in their format alone."""
    return row["structure"], tuple(row["blocks"] or ()), row["ratio"], row["calibration_sha256"]
