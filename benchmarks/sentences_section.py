"""The table of sentence embeddings."""

from __future__ import annotations

from conditions import RESULTS, table_of
from text_ratio_sections import described, method_of, thousands

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped, label_of


def sentences_section(file: str = "sentences.json") -> str:
    """One line for each method, size and calibration set, with the cosine on each text."""
    result = read_result(RESULTS / file)
    rows = rows_of(result)
    lines = []
    for of_method in grouped(rows, method_of).values():
        first = of_method[0]
        cosines = {
            text: sum(row["cosine"] for row in found) / len(found)
            for text, found in grouped(of_method, lambda row: row["dataset"]).items()
        }
        lines.append(
            {
                "kept": f"{100 * first['ratio']:.0f} %",
                "layers": label_of(first),
                "method": first["method"],
                "fitted to": described(first),
                "trained on": trained(first),
                **{f"cosine, {text}": f"{cosine:.4f}" for text, cosine in cosines.items()},
                "commit": commits_of(of_method),
            }
        )
    table, where = table_of(lines, rows, result, [key for key in lines[0] if key != "commit"])
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    return f"{table}\n\n{models}; {result['protocol']}. {where}."


def trained(row: dict) -> str:
    """The tokens of all epochs, and how many these are."""
    if not row.get("finetune_tokens"):
        return ""
    return f"{thousands(row['finetune_tokens'])}{', epochs: {}'.format(row['epochs']) if row.get('epochs') else ''}"
