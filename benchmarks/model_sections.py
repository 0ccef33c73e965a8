"""Tables of whole models."""

from __future__ import annotations

from conditions import RESULTS, commits_of, machine
from summaries import VARIANTS, models_summary, papers_summary, profiles

from hf_blr.bench.report.files import read_result
from hf_blr.cli.table import format_table

#: tokens of a forward, and the texts of one, that README leaves to NOTES
OTHER_TOKENS, OTHER_BATCHES = (128, 4096, 16384), {"GPT2-S": (64,)}


def models_section() -> str:
    """Whole models: prefill of the usual sizes, decoding, a training step."""
    result = read_result(RESULTS / "models_h100.json")
    good = [row for row in model_rows() if not of_other_size(row)]
    modes = sorted({row["mode"] for row in good if "mode" in row})
    compiled = f"; torch.compile in mode {' and '.join(modes)}" if modes else ""
    return (
        f"{models_summary(good)} Each in its fastest form among those measured, dense too{compiled}. "
        f"{result['dtype']}, {result['protocol']}; half of each projection kept. "
        f"{machine(result['environment'], commits_of(good))}, transformers {result['environment']['transformers']}."
    )


def model_rows() -> list[dict]:
    """Of whole models, without those that failed."""
    return [row for row in read_result(RESULTS / "models_h100.json")["rows"] if "error" not in row]


def of_other_size(row: dict) -> bool:
    """Whether it is a prefill that README leaves out."""
    other = row.get("tokens") in OTHER_TOKENS or row.get("batch") in OTHER_BATCHES.get(row["model"], ())
    return row["measurement"] == "prefill" and other


def other_sizes_section() -> str:
    """Prefill of the sizes that README leaves out."""
    return f"{models_summary([row for row in model_rows() if of_other_size(row)])} Conditions as in README."


def papers_section() -> str:
    """The paper's ranks and blocks in whole models."""
    rows = [row for row in model_rows() if row["measurement"] != "storage"]
    return f"{papers_summary(rows)} Conditions as above."


def storage_section() -> str:
    """Whole models on disk."""
    table: dict[str, dict] = {}
    for row in model_rows():
        if row["measurement"] == "storage":
            line = table.setdefault(row["model"], {"GB on disk (s to load)": row["model"]})
            line[VARIANTS.get(row["variant"], row["variant"])] = f"{row['disk_bytes'] / 1e9:.3f} ({row['load_s']:.1f})"
    return format_table(sorted(table.values(), key=lambda line: line["GB on disk (s to load)"]))


def profiles_section() -> str:
    """Where the time of whole models goes."""
    return profiles(model_rows())


def dependent_launches_section() -> str:
    """A decoding step with and without dependent launches in Inductor's kernels."""
    result = read_result(RESULTS / "dependent_launches_h100.json")
    found: dict[tuple, dict] = {}
    for row in result["rows"]:
        found.setdefault((row["variant"], row["mode"]), {})[row["dependent_launches"]] = row["graph_ms"]
    table = [
        {"Llama-7B, one text": variant, "mode": mode, "ms without": f"{ms[False]:.2f}", "ms with": f"{ms[True]:.2f}"}
        for (variant, mode), ms in found.items()
    ]
    return f"{format_table(table)}\n\n{result['dtype']}, {result['protocol']}. {machine(result['environment'])}."
