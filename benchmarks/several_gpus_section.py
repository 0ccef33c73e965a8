"""The tables of two GPUs beside one."""

from __future__ import annotations

import json

import conditions

from hf_blr.markdown import format_table

NAMES = {"compress": "compress", "ddp": "train, DDP", "fsdp2": "train, FSDP2"}


def several_gpus_section() -> str:
    """What two processes gain, what they end with, and what tensor parallelism would."""
    result = json.loads((conditions.RESULTS / "several_gpus_h200.json").read_text())
    rows = {(row["measured"], row["processes"]): row for row in result["rows"]}
    where = result["environment"]
    about = rows["compress", 1]
    parts = [
        format_table([gain_of(rows[name, 1], rows[name, 2]) for name in NAMES if (name, 2) in rows]),
        f"{about['model']}'s shape with {about['blocks']} blocks; compressed low-rank at 0.7 with {about['tokens']} "
        "tokens of random text; trained: half of each projection kept, factors alone, as many tokens on each GPU.",
        told(rows["compress", 2], rows.get(("fsdp2", 2)), rows.get(("placement", 1))),
    ]
    if ("tensor_parallel", 2) in rows:
        parts.append(format_table([split_of(row) for row in rows["tensor_parallel", 2]["rows"]]))
    parts.append(f"`benchmarks/several_gpus.py`; {conditions.machine(where)}, transformers {where['transformers']}.")
    return "\n\n".join(parts)


def gain_of(one: dict, two: dict) -> dict:
    """The line of one step: seconds or tokens a second, and how many times as fast two are."""
    if "seconds" in one:
        shown = [f"{row['seconds']:.1f} s" for row in (one, two)]
        gain = one["seconds"] / two["seconds"]
    else:
        shown = [f"{row['tokens_per_second']:.0f} tokens/s" for row in (one, two)]
        gain = two["tokens_per_second"] / one["tokens_per_second"]
    return {"": NAMES[one["measured"]], "one GPU": shown[0], "two GPUs": shown[1], "times as fast": f"{gain:.2f}"}


def told(compressed: dict, sharded: dict | None, placed: dict | None) -> str:
    """In sentences, whether two GPUs give what one does."""
    plan = "the same plan" if compressed["same_plan"] else "another plan"
    said = [
        f"Two processes end with {plan} as one, and with predictions {compressed['divergence_from_one_process']:.1g} "
        f"nats a token away from its; both are {compressed['divergence_from_dense']:.1g} away from the dense model."
    ]
    if sharded is not None:
        same = "the same bits as" if sharded["same_bits_in_checkpoint"] else "other bits than"
        said.append(f"The checkpoint of FSDP2's gathered shards reads back with {same} what was gathered.")
    if placed is not None:
        alike = [name for name, found in placed.items() if isinstance(found, dict) and found["same_bits"]]
        others = [name for name, found in placed.items() if isinstance(found, dict) and not found["same_bits"]]
        said.append(f"Logits with blocks on two GPUs, fused: the same bits as on one for {', '.join(alike) or 'none'}.")
        if others:
            said.append(f"Others for {', '.join(others)}.")
    return " ".join(said)


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
