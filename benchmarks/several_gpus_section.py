"""The tables of two GPUs beside one."""

from __future__ import annotations

import json

import conditions

from hf_blr.markdown import format_table

NAMES = {"compress": "compress", "ddp": "train, DDP", "fsdp2": "train, FSDP2"}


def several_gpus_section() -> str:
    """What two processes end with; on GPUs also what they gain, and what tensor parallelism would."""
    result = json.loads((conditions.RESULTS / "several_gpus.json").read_text())
    rows = {(row["measured"], row["processes"]): row for row in result["rows"]}
    where, about = result["environment"], rows["compress", 1]
    parts = [told(rows["compress", 2], rows["fsdp2", 2])]
    if about["device"] == "cuda":
        parts.append(placed(rows["placement", 1]))
        parts.append(format_table([gain_of(rows[name, 1], rows[name, 2]) for name in NAMES]))
        if ("tensor_parallel", 2) in rows:
            parts.append(format_table([split_of(row) for row in rows["tensor_parallel", 2]["rows"]]))
    else:
        parts.append("On a CPU that does other work too, times say nothing, and the script has not run on GPUs yet.")
    parts.append(
        f"{about['model']}'s shape with {about['blocks']} blocks{sizes_of(about)}, low-rank at 0.7 with "
        f"{about['tokens']} tokens of random text; trained at half of each projection. "
        f"`benchmarks/several_gpus.py`; {conditions.machine(where)}, transformers {where['transformers']}."
    )
    return "\n\n".join(parts)


def sizes_of(row: dict) -> str:
    """In words, where they are not the model's own."""
    named = ", ".join(f"{name} {value}" for name, value in row["sizes"].items())
    return f" ({named})" if named else ""


def gain_of(one: dict, two: dict) -> dict:
    """The line of one step: seconds or tokens a second, and how many times as fast two are."""
    if "seconds" in one:
        shown = [f"{row['seconds']:.1f} s" for row in (one, two)]
        gain = one["seconds"] / two["seconds"]
    else:
        shown = [f"{row['tokens_per_second']:.0f} tokens/s" for row in (one, two)]
        gain = two["tokens_per_second"] / one["tokens_per_second"]
    return {"": NAMES[one["measured"]], "one GPU": shown[0], "two GPUs": shown[1], "times as fast": f"{gain:.2f}"}


def told(compressed: dict, sharded: dict) -> str:
    """In sentences, whether two processes end as one does."""
    plan = "the same plan" if compressed["same_plan"] else "another plan"
    same = "the same bits as" if sharded["same_bits_in_checkpoint"] else "other bits than"
    return (
        f"Two processes end with {plan} as one, and with predictions {compressed['divergence_from_one_process']:.1g} "
        f"nats a token away from its; both are {compressed['divergence_from_dense']:.1g} away from the dense model. "
        f"The checkpoint of FSDP2's gathered shards reads back with {same} what was gathered."
    )


def placed(row: dict) -> str:
    found = {name: each["same_bits"] for name, each in row.items() if isinstance(each, dict) and "same_bits" in each}
    alike = [name for name, equal in found.items() if equal]
    return (
        "Logits of fused layers whose blocks lie on two GPUs have the same bits as on one: "
        f"{', '.join(alike) or 'none'}, of {', '.join(found)}."
    )


def split_of(row: dict) -> dict:
    """The line of one number of tokens: an MLP of low-rank layers on one GPU, and as two would hold it."""
    split = row["half_us"] + row["sum_us"]
    return {
        "tokens": row["tokens"],
        "MLP, us": f"{row['whole_us']:.1f}",
        "half of it": f"{row['half_us']:.1f}",
        "sum over GPUs": f"{row['sum_us']:.1f}",
        "times as fast": f"{row['whole_us'] / split:.2f}",
    }
