"""Writes the result tables of README and NOTES from the result files; `--check` only says whether they are current."""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import goals
from summaries import VARIANTS, models_summary, papers_summary, profiles, quality_summary, square_blast

from hf_blr.bench.ceilings import predictions
from hf_blr.bench.model_ceilings import model_predictions
from hf_blr.cli.table import format_table
from hf_blr.evaluation.devices import DEVICES
from hf_blr.ops.triton.launch import reads_swapped
from hf_blr.results.files import read_result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
#: the layer that the speed table shows: q, k, v and o of Llama-7B, 4096 -> 4096
SPEED_LAYER = ("Llama-7B", "q,k,v,o")


def demo_section() -> str:
    """Perplexities of the demo, and the conditions."""
    result = json.loads((RESULTS / "demo.json").read_text())
    on_gpu = json.loads((RESULTS / "demo_h200.json").read_text())
    found = ", ".join(f"{row['model']} {row['perplexity']:.2f}" for row in on_gpu["rows"])
    return (
        f"{format_table(result['rows'])}\n\n{result['conditions']} `{result['command']}`, {result['seconds']:.0f} s in "
        f"all; {machine(result['environment'])}, Python {result['environment']['python']}, "
        f"transformers {result['environment']['transformers']}. `seconds` are those of the fit. "
        f"On a GPU the same command takes {on_gpu['seconds']:.0f} s ({machine(on_gpu['environment'])}, Python "
        f"{on_gpu['environment']['python']}, whose documentation is another: {found})."
    )


def speed_section() -> str:
    """Speed-ups of one layer over dense cuBLAS, by structure and number of tokens."""
    result = json.loads((RESULTS / "layers_h100.json").read_text())
    table: dict[tuple, dict] = {}
    for row in result["rows"]:
        if (row["model"], row["layer"]) == SPEED_LAYER and row["impl"] == "hf_blr":
            key = row["structure"], *row["blocks"], row["rank"]
            column = f"{row['tokens']} tokens" + (", training" if row["direction"] != "forward" else "")
            table.setdefault(key, {})[column] = row["speedup_vs_dense"]
    columns = ["1 tokens", "16 tokens", "1024 tokens", "4096 tokens", "4096 tokens, training"]
    rows = [
        {"structure": s, "blocks": f"{b1} x {b2}", "rank": r, **{c: f"{speed[c]:.2f}x" for c in columns if c in speed}}
        for (s, b1, b2, r), speed in table.items()
    ]
    return (
        f"{format_table(rows, ['structure', 'blocks', 'rank', *columns])}\n\n"
        f"Speed over dense cuBLAS of one 4096 x 4096 layer at half the parameters, bfloat16; {result['protocol']}. "
        f"{machine(result['environment'], commits_of(result['rows'], result['environment']['commit']))}."
    )


def groups_section() -> str:
    """Projections with one input, one by one and together, over the faster of two ways to run the dense ones."""
    result = read_result(RESULTS / "groups_h100.json")
    table: dict[tuple, dict] = {}
    for row in result["rows"]:
        if row["structure"] != "dense" and row["blocks"] in ([1, 1], [4, 4]):
            key = row["group"], row["structure"], *row["blocks"]
            table.setdefault(key, {})[row["tokens"], row["how"]] = f"{row['speedup_vs_dense']:.2f}x"
    tokens = sorted({row["tokens"] for row in result["rows"]})
    rows = [
        {"group": group, "structure": s, "blocks": f"{b1} x {b2}"}
        | {f"{t} tokens": f"{speed[t, 'apart']} -> {speed[t, 'together']}" for t in tokens}
        for (group, s, b1, b2), speed in table.items()
    ]
    return (
        f"{format_table(rows)}\n\nSpeed over dense at half the parameters, one by one -> together, bfloat16; dense is "
        "the faster of one product for each projection and one with the concatenated weights. "
        f"{result['protocol']}. {machine(result['environment'])}."
    )


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


def one_token_section() -> str:
    """What both stages of one token take, before and with the kernels whose programs stay."""
    result = read_result(RESULTS / "one_token_h100.json")
    table = [
        {
            "us": f"{row['structure']} {row['blocks'][0]} x {row['blocks'][1]}, {row['layer']}",
            "its bytes at 3 TB/s": f"{row['megabytes'] / 3:.1f}",
            "before": f"{row['us_before']:.1f} ({row['us_before_apart']:.1f})",
            "now": f"{row['us']:.1f} ({row['us_apart']:.1f})",
        }
        for row in result["rows"]
    ]
    return (
        f"{format_table(table)}\n\nIn brackets: behind another kernel. {result['dtype']}, {result['protocol']}. "
        f"{machine(result['environment'])}."
    )


def monarch_last_stage_section() -> str:
    """Both ways to run Monarch's last stage at many tokens, and which one the rule takes."""
    result = read_result(RESULTS / "monarch_last_stage_h100.json")
    table: dict[tuple, dict] = {}
    for row in result["rows"]:
        sizes = row["b1"], row["b2"], row["q"], row["rank"]
        place = f"{row['layer']}, {row['b1']} x {row['b2']}, rank {row['rank']}"
        marks = ("*", "") if reads_swapped(*sizes, row["tokens"]) else ("", "*")
        us = f"{row['in_place_us']:.0f}{marks[0]} / {row['copied_us']:.0f}{marks[1]}"
        table.setdefault((row["layer"], *sizes), {"us, in place / copied": place})[f"{row['tokens']} tokens"] = us
    return (
        f"{format_table(list(table.values()))}\n\n\\* what the rule takes. {result['dtype']}, {result['protocol']}. "
        f"{machine(result['environment'])}."
    )


def stacks_section() -> str:
    """The first stages of few tokens, as single kernels and as stacks of products."""
    result = read_result(RESULTS / "stacks_h100.json")
    first, table = "us, by decode_project / as a stack / by cuBLAS", {}
    for row in result["rows"]:
        key = row["structure"], *row["blocks"], row["model"], row["layer"]
        line = table.setdefault(
            key, {"us, by decode_project / as a stack / by cuBLAS": "{} {} x {}, {} {}".format(*key)}
        )
        found = [row["project_us"], row["stack_us"], *([row["cublas_us"]] if row["cublas_us"] else [])]
        line[f"{row['tokens']} tokens"] = " / ".join(f"{us:.1f}" for us in found)
    tokens = sorted({row["tokens"] for row in result["rows"]})
    columns = [first, *(f"{t} tokens" for t in tokens)]
    where = machine(result["environment"], commits_of(result["rows"]))
    return f"{format_table(list(table.values()), columns)}\n\n{result['dtype']}, {result['protocol']}. {where}."


def roofline_section() -> str:
    """How well the predictions do on the layers and whole models that were measured."""
    device = DEVICES["H100-measured"]
    rows = predictions(read_result(RESULTS / "layers_h100.json")["rows"], device)
    groups: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["direction"], row["tokens"])):
        name = f"{row['tokens']}" + (", training" if row["direction"] != "forward" else "")
        groups.setdefault(name, []).append(abs(row["deviation"]))
    table = [off_by(name, "layers", off) for name, off in groups.items()]
    models = model_predictions(model_rows(), device)
    for measurement, name in (("prefill", "whole models, prefill"), ("decode", "whole models, decoding")):
        off = [abs(row["deviation"]) for row in models if row["measurement"] == measurement]
        table.append(off_by(name, "rows", off))
    return format_table(table)


def off_by(name: str, what: str, off: list[float]) -> dict:
    """off: |predicted / measured - 1| of each."""
    within = f"{sum(value <= 0.25 for value in off)} of {len(off)} {what}"
    return {"tokens": name, "within 25 %": within, "median off": f"{100 * statistics.median(off):.0f} %"}


def quality_section() -> str:
    """Perplexities of the quality benchmark, in short."""
    result = read_result(RESULTS / "quality.json")
    return f"{quality_summary(result['rows'])}\n\n{quality_conditions(result)}"


def profiles_section() -> str:
    """Where the time of whole models goes."""
    return profiles(model_rows())


def square_blast_section() -> str:
    """The most accurate structure beside low-rank."""
    result = read_result(RESULTS / "quality.json")
    return f"{square_blast(result['rows'])}\n\n{quality_conditions(result)}"


def quality_rows_section() -> str:
    """All rows of the quality benchmark, one line for each method and size, a column for each text."""
    result = read_result(RESULTS / "quality.json")
    lines: dict[tuple, dict] = {}
    for row in result["rows"]:
        blocks = "" if row["blocks"] is None else "{} x {}".format(*row["blocks"])
        key = row["ratio"], row["structure"], blocks, row["method"]
        line = {"kept": f"{100 * row['ratio']:.0f} %", "structure": row["structure"], "blocks": blocks}
        line = lines.setdefault(key, {**line, "method": row["method"], "MB": row["bytes"] / 1e6})
        line[f"{row['dataset']} ppl"] = row["ppl"]
        line["seconds"] = row["fit_seconds"]
    rows = [lines[key] for key in sorted(lines, key=lambda key: (-key[0], str(key)))]
    # the texts of all rows: a run that was stopped may not have scored each
    texts = dict.fromkeys(f"{row['dataset']} ppl" for row in result["rows"])
    columns = ["kept", "structure", "blocks", "method", "MB", *texts, "seconds"]
    return f"{format_table(rows, columns)}\n\n{quality_conditions(result)}"


def quality_conditions(result: dict) -> str:
    models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
    shared = max(row.get("statistics_seconds", 0.0) for row in result["rows"])
    return (
        f"{models}; {result['protocol']}. Seconds are those of the fit, or of the refinement, and missing where two "
        f"runs shared the GPU; the statistics that all fits share took {shared:.0f} s. "
        f"{machine(result['environment'], commits_of(result['rows']))}."
    )


def commits_of(rows: list[dict], default: str = "") -> str:
    """Those that the rows were measured at, each once; `default` is that of rows that say nothing."""
    return ", ".join(dict.fromkeys(row.get("commit", default)[:7] for row in rows))


def machine(environment: dict, commits: str = "") -> str:
    """commits: where rows are of more than one."""
    commits = commits or environment["commit"][:7]
    return f"{environment['device']}, torch {environment['torch']}, commit {commits}, {environment['date']}"


SECTIONS = {
    "demo": demo_section,
    "quality": quality_section,
    "speed": speed_section,
    "groups": groups_section,
    "models": models_section,
    "papers": papers_section,
    "roofline": roofline_section,
}


DOCUMENTS = {
    ROOT / "README.md": SECTIONS,
    ROOT / "benchmarks" / "NOTES.md": {
        "layer-goals": goals.layer_goals,
        "model-goals": goals.model_goals,
        "profiles": profiles_section,
        "other-sizes": other_sizes_section,
        "storage": storage_section,
        "dependent-launches": dependent_launches_section,
        "one-token": one_token_section,
        "monarch-last-stage": monarch_last_stage_section,
        "stacks": stacks_section,
        "square-blast": square_blast_section,
        "counters": goals.counters,
        "quality-rows": quality_rows_section,
    },
}


def updated(text: str, sections: dict) -> str:
    """A document with each section between its markers written anew."""
    for name, section in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{section()}\n\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    current = True
    for path, sections in DOCUMENTS.items():
        text = path.read_text()
        new = updated(text, sections)
        current = current and new == text
        if not args.check:
            path.write_text(new)
    return int(args.check and not current)


if __name__ == "__main__":
    sys.exit(main())
