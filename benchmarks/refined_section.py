"""The second table of the README: what refinement leaves of the loss, and what fewer bits add to a structure."""

from __future__ import annotations

from statistics import geometric_mean

from conditions import RESULTS, machine
from runs import DENSE_REFINED, REFINED, TWICE_FITTED_JOINT
from runs_in_bits import GPTQ
from text_ratio_sections import mean_ratio, mixture_trained_on, ratio, trained_on

from hf_blr.bench.report.commits import commits_of, rows_of
from hf_blr.bench.report.files import read_result
from hf_blr.bench.report.lines import grouped
from hf_blr.markdown import format_table

#: of each file the calibration set that is shown
QUALITY = "quality_h200.json", "20 % code, 25 % mixed, 30 % own, 25 % valid"
BITS = "bits_h200.json", "valid"
#: `block_steps` of pivoted's rows
STEPS = 256
MORE_STEPS = f"{TWICE_FITTED_JOINT}, {STEPS} steps"
#: (file and set, (method, structure, ratio, bits of a budget or format)), as rows name them
SHOWN = (
    (QUALITY, (MORE_STEPS, "pivoted", 0.8, "plain")),
    (QUALITY, (MORE_STEPS, "pivoted", 0.5, "plain")),
    (QUALITY, (f"{MORE_STEPS}, refined", "pivoted", 0.8, "plain")),
    (QUALITY, (f"{MORE_STEPS}, refined", "pivoted", 0.5, "plain")),
    (BITS, (f"{GPTQ}, refined", "dense", 1.0, "int4")),
    (BITS, (REFINED, "auto", 1.0, 4.25)),
    (BITS, (REFINED, "auto", 1.0, 3.5)),
)
TEXTS = ("wikitext2", "ptb", "c4", "code")
#: (model, tokens) of the prefill whose speed is told
WHOLE = "Llama-3-8B", 4096


def refined_section() -> str:
    """A line for each of `SHOWN`: bits, four texts over dense, and their mean; then what bits do for the speed."""
    lines, used = [], []
    for (file, calibration), wanted in SHOWN:
        rows = rows_of(read_result(RESULTS / file))
        found = best_of([r for r in rows if key_of(r) == wanted and r["calibration"] == calibration])
        method, structure, kept, form = wanted
        steps = ", passes and steps" if method.startswith(TWICE_FITTED_JOINT) else ""
        used += found
        lines.append(
            {
                "": f"{structure}, {named(kept, form)}{steps}",
                "refined": f"{row_tokens(found):.1f} M tokens" if row_tokens(found) else "",
                "bits a weight": f"{geometric_mean(row['bits'] for row in found):.2f}",
                **{row["dataset"]: f"{ratio(row):.2f}x" for row in found},
                "mean": f"{mean_ratio(found):.3f}",
            }
        )
    return f"{format_table(lines)}\n\n{conditions_of(used)}\n\n**Speed in fewer bits.** {speeds()}"


def best_of(rows: list[dict]) -> list[dict]:
    """Of rows that were trained on several texts those of the least mean, in the order of `TEXTS`."""
    groups = grouped(rows, trained_on).values()
    return sorted(min(groups, key=mean_ratio), key=text_of)


def named(kept: float, form: str | float) -> str:
    """What is kept of a structure, the format of dense layers, or the bits of a budget."""
    if form == "plain":
        return f"{100 * kept:.0f} % kept"
    return form if isinstance(form, str) else f"{form:g} bits"


def key_of(row: dict) -> tuple:
    return row["method"], row["structure"], row["ratio"], row.get("bits_per_weight") or row.get("format", "plain")


def text_of(row: dict) -> int:
    return TEXTS.index(row["dataset"])


def row_tokens(rows: list[dict]) -> float:
    """Millions of tokens of the refinement."""
    return rows[0].get("finetune_tokens", 0) / 1e6


def conditions_of(rows: list[dict]) -> str:
    """What the ratios are of, and what the same training does for the dense model."""
    result = read_result(RESULTS / QUALITY[0])
    everything = rows_of(result)
    pivoted = [row for row in rows if row["structure"] == "pivoted" and row["finetune_tokens"]]
    trained = dict.fromkeys(mixture_trained_on(row) for row in pivoted)
    dense = [row for row in everything if row["method"].startswith(DENSE_REFINED)]
    fair = [[row for row in dense if mixture_trained_on(row) == mixture] for mixture in trained]
    alike = ", ".join(f"{mean_ratio(of):.3f} after {row_tokens(of):.1f} M tokens" for of in fair)
    return (
        f"Perplexity over that of the dense {rows[0]['model']}; `mean` is geometric. Lines in bits are of the model "
        "in another basis, fitted to WikiText-2's validation part; the others are fitted to a mixture. Refined like "
        f"pivoted, the dense model has {alike}; passes and steps are `passes=2` and `block_steps={STEPS}`. "
        f"{result['environment']['device']}, commits {commits_of(rows)}."
    )


def speeds() -> str:
    """Prefill in fp8 and decoding in int4, of whole models."""
    models, decode = (read_result(RESULTS / name) for name in ("models_h200.json", "decode_h200.json"))
    prefill = {row["variant"]: row for row in rows_of(models) if (row["model"], row.get("tokens")) == WHOLE}
    steps = {row["variant"]: row for row in rows_of(decode) if row["batch"] == 1}
    fp8, int4, dense = prefill["low_rank@128/fp8+fused"], steps["low_rank/int4+fused"], steps["dense"]
    where = f"{machine(decode['environment'])}; in fp8 commit {commits_of([fp8])}"
    return (
        f"Low-rank at half, {dense['model']}'s shape: in fp8, at ranks that 128 divides, "
        f"it takes {fp8['tokens']} tokens {prefill['dense']['ms'] / fp8['ms']:.2f}x as fast as dense in bfloat16 and "
        f"{prefill['dense/fp8']['ms'] / fp8['ms']:.2f}x as fast as dense in fp8; in int4 the model takes "
        f"{int4['weight_bytes'] / dense['weight_bytes']:.2f} of the memory and decodes "
        f"{dense['graph_ms'] / int4['graph_ms']:.2f}x as fast. {where}."
    )
