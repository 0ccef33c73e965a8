"""Table of a decoding step of whole models in bits."""

from __future__ import annotations

from conditions import RESULTS, table_of

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped

FILE = "decode_h200.json"


def decode_section() -> str:
    """A line for each variant, slower ones first: ms of the step's graph, speed over dense, and the products' part."""
    result = read_result(RESULTS / FILE)
    rows = sorted(rows_of(result), key=lambda row: (row["batch"], -row["graph_ms"]))
    dense = {row["batch"]: row["graph_ms"] for row in rows if row["variant"] == "dense"}
    lines = []
    for variant, found in grouped(rows, lambda row: row["variant"]).items():
        line = {"ms": variant, "weights, GB": f"{found[0]['weight_bytes'] / 1e9:.2f}"}
        for row in found:
            texts = f"{row['batch']} text" + "s" * (row["batch"] > 1)
            parts = row["profile"]["parts"]
            line[texts] = f"{row['graph_ms']:.2f} ({dense[row['batch']] / row['graph_ms']:.2f}x)"
            line[f"{texts}, products"] = f"{parts['blr'] + parts['products']:.2f}"
        lines.append(line | {"commit": commits_of(found)})
    table, where = table_of(lines, rows, result)
    return (
        f"{table}\n\n{rows[0]['model']}; {result['dtype']}, {result['protocol']}. Products: kernels of the projections "
        f"and of the head, from a profile of the graph. {where}."
    )
