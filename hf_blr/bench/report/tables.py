"""From the rows of result files to the tables that people read."""

from __future__ import annotations

from dataclasses import dataclass, field

#: fields by which rows are told apart: all of them are there
KINDS = {"layers": ("us", "impl", "speedup_vs_dense"), "models": ("measurement", "model"), "quality": ("dense_ppl",)}


@dataclass(frozen=True)
class Table:
    """Rows `{column: value}` under a title, with the conditions under which they hold."""

    title: str
    rows: list[dict]
    note: str = ""
    columns: list[str] = field(default_factory=list)

    def __post_init__(self):
        if not self.columns:
            self.columns.extend(dict.fromkeys(column for row in self.rows for column in row))


def kind_of(result: dict) -> str | None:
    """ "layers", "models" or "quality"; None for rows of another kind, which are shown as they are.

    So are those of a file that says under "varied" in what else its rows differ: they must not be compared as if they
    did not.
    """
    rows = result["rows"]
    if result.get("varied"):
        return None
    return next((kind for kind, names in KINDS.items() if rows and all(name in rows[0] for name in names)), None)


def tables(name: str, result: dict) -> list[Table]:
    """The tables of one result file. `name` is that of the file."""
    kind, note = kind_of(result), conditions(result)
    if kind == "layers":
        return layer_tables(result["rows"], note)
    if kind == "models":
        return model_tables(result["rows"], note)
    if kind == "quality":
        return [Table("Perplexity", quality_rows(result["rows"]), note)]
    return [Table(name, result["rows"], note)]


def conditions(result: dict) -> str:
    """What every number of the file holds for, in a line."""
    where = result.get("environment", {})
    versions = [f"{name} {where[name]}" for name in ("torch", "triton", "transformers") if where.get(name)]
    stamp = [f"commit {where['commit'][:7]}"] if where.get("commit") else []
    parts = [where.get("device"), *versions, *stamp, where.get("date")]
    said = [result.get(name) for name in ("dtype", "protocol", "conditions")]
    return ". ".join([*(s.rstrip(".") for s in said if s), ", ".join(p for p in parts if p)]) + "."


def layer_tables(rows: list[dict], note: str) -> list[Table]:
    """One table per model: microseconds and speed-ups of our kernels, a column for each number of tokens."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines: dict[tuple, dict] = {}
        for row in rows:
            if row["model"] != model or row["impl"] not in ("hf_blr", "cublas"):
                continue
            column = f"{row['tokens']} tokens" + ("" if row["direction"] == "forward" else ", training")
            key = row["layer"], row["structure"], *row["blocks"]
            line = lines.setdefault(key, {"layer": row["layer"], "structure": row["structure"]})
            line["blocks"], line["rank"] = "{} x {}".format(*row["blocks"]), row["rank"]
            line[column] = row["us"] if row["structure"] == "dense" else f"{row['speedup_vs_dense']:.2f}x"
        title = f"Layers of {model}" if model else "Layers"
        found.append(Table(title, list(lines.values()), f"Dense in microseconds, the others as speed over it. {note}"))
    return found


def model_tables(rows: list[dict], note: str) -> list[Table]:
    """Time, speed over dense and memory of whole models, each variant and dense in the fastest form measured."""
    good = [row for row in rows if "error" not in row]
    titles = {"prefill": "Prefill", "decode": "Decoding", "training": "Training step"}
    found = [Table(f"{titles[m]} of whole models", compared(good, m), note) for m in titles]
    found.append(Table("Models on disk", storage_rows(good), note))
    found.append(Table("Where the time goes", profile_rows(good), f"Milliseconds by PyTorch's profiler. {note}"))
    failed = [row for row in rows if "error" in row]
    found.append(Table("What failed", [{k: r.get(k) for k in FAILURE_COLUMNS} for r in failed], note))
    return [table for table in found if table.rows]


FAILURE_COLUMNS = ("model", "variant", "measurement", "batch", "tokens", "form", "error")


def compared(rows: list[dict], measurement: str) -> list[dict]:
    """One row for each model, batch, number of tokens and variant: the fastest form, against dense's fastest."""
    best: dict[tuple, dict] = {}
    for row in rows:
        if row["measurement"] == measurement:
            # a step that keeps fewer activations is another measurement, not another form
            key = row["model"], row["batch"], row["tokens"], row.get("activation_budget", 1.0), row["variant"]
            if key not in best or row["ms"] < best[key]["ms"]:
                best[key] = row
    return [compared_row(row, best.get((*key[:-1], "dense"))) for key, row in sorted(best.items(), key=by_speed)]


def by_speed(entry) -> tuple:
    (*place, variant), _ = entry
    return *place, variant != "dense", variant


def compared_row(row: dict, dense: dict | None) -> dict:
    line = {"model": row["model"], "variant": row["variant"], "batch": row["batch"]}
    if row["measurement"] != "decode":
        line["tokens"] = row["tokens"]
    line["form"] = f"{row['form']}, {row['mode']}" if "mode" in row else row["form"]
    if "activation_budget" in row:
        line["form"] += f", keeps {100 * row['activation_budget']:.0f} % of activations"
    line["ms"] = row["ms"]
    if row["measurement"] == "decode":
        line["tokens/s"] = row["tokens_per_second"]
    line["speed over dense"] = None if dense is None else dense["ms"] / row["ms"]
    line["parameters (M)"] = row["parameters"] / 1e6
    if row.get("peak_bytes"):
        line["peak GB"] = row["peak_bytes"] / 1e9
        line["peak / dense"] = row["peak_bytes"] / dense["peak_bytes"] if dense else None
    return line


def by_size(rows: list[dict], measurement: str) -> dict[tuple[str, str], dict[str, dict]]:
    """{(model, size in words): {variant: row of `compared`}}; with `+fused` or without, whichever is faster.

    The names have no `+fused`; a row's own variant says which it is.
    """
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for row in compared(rows, measurement):
        group, name = found.setdefault((row["model"], size_of(row)), {}), row["variant"].removesuffix("+fused")
        if name not in group or row["ms"] < group[name]["ms"]:
            group[name] = row
    return found


def size_of(row: dict) -> str:
    """`8 x 1024` of a row of `compared`, batch and tokens, and what it keeps of the activations where that is said."""
    kept = row["form"].partition(", keeps ")[2]
    return f"{row['batch']} x {row.get('tokens', 1)}" + f", {kept} kept" * bool(kept)


def storage_rows(rows: list[dict]) -> list[dict]:
    return [
        {
            "model": row["model"],
            "variant": row["variant"],
            "GB on disk": row["disk_bytes"] / 1e9,
            "load (s)": row["load_s"],
        }
        for row in rows
        if row["measurement"] == "storage"
    ]


def profile_rows(rows: list[dict]) -> list[dict]:
    """What the parts of a graph take, of the rows that were profiled."""
    return [
        {
            "model": row["model"],
            "variant": row["variant"],
            "": row["measurement"],
            "batch": row["batch"],
            "tokens": row["tokens"],
            "mode": row.get("mode", ""),
            "in all": row.get("graph_ms", row["ms"]),
            **row["profile"]["parts"],
            "longest kernel": row["profile"]["kernels"][0]["kernel"],
        }
        for row in rows
        if "profile" in row
    ]


def quality_rows(rows: list[dict]) -> list[dict]:
    """Perplexities; a file may leave out what it does not know."""
    names = {
        "model": "model",
        "dataset": "text",
        "protocol": "protocol",
        "structure": "structure",
        "method": "method",
        "ratio": "kept",
        "ppl": "perplexity",
        "dense_ppl": "dense",
        "parameters": "parameters",
        "bytes": "bytes",
        "fit_seconds": "fit (s)",
        "calibration_tokens": "calibration tokens",
        "finetune_tokens": "fine-tuning tokens",
    }
    used = [name for name in names if any(row.get(name) is not None for row in rows)]
    return [{names[name]: row.get(name) for name in used} for row in rows]
