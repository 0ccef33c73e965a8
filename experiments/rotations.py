"""What the order of heads and rotations of values and of the residual stream buy in relative error on the activations.

    python experiments/rotations.py wikitext2/valid.txt [--layers 12 2 25] [--out benchmarks/results/symmetries.json]
    python experiments/rotations.py wikitext2/valid.txt --shared 6 18 --layers 6 12 18

Each projection is fitted as it is and after a change that leaves the model's outputs alone (`model_symmetries.py`), at
equal stored numbers. `ratio` near one in the table printed at the end: the change buys nothing.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from model_symmetries import READERS, changed, head_order, stream_rotation, value_rotation
from rotation_choices import fitted_rotation, stream_choices, value_choices
from symmetries import (
    ATTENTION,
    LAYERS,
    MLP,
    RATIOS,
    ROUNDS,
    SEQLEN,
    WINDOWS,
    error,
    layer_name,
    model_and_grams,
)

from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import ResultFile, read_result
from hf_blr.structures import make_spec

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

MONARCH = ("monarch", (4, 4))
STRUCTURES = (("low_rank", (1, 1)), MONARCH, ("blast", (4, 16)), ("blast", (16, 16)))
#: up reads what gate reads, and has its shape
LEAVES = (*ATTENTION, "gate_proj", "down_proj")


def folded(data, norms):
    """The readers' weights with the norms' weights in them, and the Grams of the inputs without."""
    return {
        leaf: (weight * norms[leaf], gram / norms[leaf] / norms[leaf][:, None]) if leaf in READERS else (weight, gram)
        for leaf, (weight, gram) in data.items()
    }


def fits(data, change, leaves, structures, **labels):
    """Rows of the fits of these projections after a change."""
    for leaf in leaves:
        weight, gram = changed(*data[leaf], change.get(leaf, (None, None)))
        for structure, blocks in structures:
            for ratio in RATIOS:
                # these take as long as all the rest
                if blocks == (16, 16) and (leaf in MLP or (ratio == RATIOS[1] and "stream" in labels["symmetry"])):
                    continue
                rank = make_spec(structure, *reversed(weight.shape), ratio=ratio, num_blocks=blocks).rank
                found = error(weight.contiguous(), gram, structure, rank, blocks)
                row = {"module": leaf, "structure": structure, "blocks": blocks, "ratio": ratio}
                yield {**labels, **row, "rel_error": found}


def layer_rows(data, norms, covariance, config):
    """All rows of one layer, the given order first."""
    group, head_dim = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    yield from fits(data, {}, LEAVES, STRUCTURES, symmetry="none", choice="given")
    generator = torch.Generator().manual_seed(1)
    kv_order = torch.randperm(config.num_key_value_heads, generator=generator)
    queries = torch.stack([torch.randperm(group, generator=generator) for _ in kv_order])
    change = head_order(kv_order, queries, head_dim)
    yield from fits(data, change, ATTENTION, STRUCTURES, symmetry="heads", choice="random order")
    for choice, rotations in value_choices(data, group, head_dim).items():
        change = value_rotation(rotations, group)
        yield from fits(data, change, change, STRUCTURES, symmetry="values", choice=choice)
    for structure in STRUCTURES[1:]:
        change_of = partial(value_rotation, group=group)
        shape = config.num_key_value_heads, head_dim, head_dim
        change = change_of(fitted_rotation([data], change_of, shape, *structure, steps=40, rate=0.01, rounds=2))
        yield from fits(data, change, change, (structure,), symmetry="values", choice="fitted to the structure")
    permutations, rotations = stream_choices(covariance)
    for symmetry, base, choices in (
        ("stream order", data, permutations),
        ("stream rotation", folded(data, norms), rotations),
    ):
        for choice, rotation in choices.items():
            yield from fits(base, stream_rotation(rotation), LEAVES, STRUCTURES, symmetry=symmetry, choice=choice)


def table(rows):
    """Geometric means of error / error of the given order, a line for each choice and structure."""
    same = ("layer", "module", "structure", "ratio")
    key = lambda row: (*(row[name] for name in same), *row["blocks"])  # noqa: E731
    given = {key(row): row["rel_error"] for row in rows if row["choice"] == "given"}
    ratios = {}
    for row in rows:
        if row["choice"] != "given":
            line = row["symmetry"], row["choice"], f"{row['structure']} {row['blocks'][0]}x{row['blocks'][1]}"
            ratios.setdefault(line, []).append(math.log(row["rel_error"] / given[key(row)]))
    for line, logs in ratios.items():
        mean, low, high = (math.exp(v) for v in (sum(logs) / len(logs), min(logs), max(logs)))
        print(f"{' | '.join(line)} | {mean:.3f} | {low:.3f} - {high:.3f} | {len(logs)}")


def shared_rows(data, norms, shared, measured, given):
    """Rows of one rotation of the stream, fitted for Monarch to the attention projections of the `shared` layers."""
    fitted = {i: folded(data[i], norms[i]) for i in sorted({*shared, *measured})}

    def change_of(rotation):
        return {
            leaf: sides for leaf, sides in stream_rotation(rotation).items() if leaf in ("q_proj", "v_proj", "o_proj")
        }

    size = len(norms[shared[0]]["q_proj"])
    layers = [fitted[i] for i in shared]
    rotation = fitted_rotation(layers, change_of, (size, size), *MONARCH, steps=20, rate=0.002, rounds=1)
    choice = f"fitted to {len(shared)} layers"
    for i in measured:
        if i not in given:
            for row in fits(data[i], {}, LEAVES, (MONARCH,), symmetry="none", choice="given"):
                yield {"layer": i, **row}
        for row in fits(
            fitted[i], stream_rotation(rotation), LEAVES, (MONARCH,), symmetry="stream rotation", choice=choice
        ):
            yield {"layer": i, **row, "of the fit": i in shared}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--layers", type=int, nargs="+", default=(12, *(i for i in LAYERS if i != 12)))
    parser.add_argument("--shared", type=int, nargs="+", help="fit one rotation of the stream to these, and only that")
    parser.add_argument("--out", type=Path, default=RESULTS / "symmetries.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = open_results(args.out)
    blocks, shared = range(30), args.shared or []
    names = {layer_name(i, leaf) for i in blocks for leaf in ("q_proj", "gate_proj")}
    names |= {layer_name(i, "o_proj") for i in shared}
    names |= {layer_name(i, leaf) for i in args.layers for leaf in ("o_proj", "down_proj")}
    model, grams = model_and_grams(args.text, list(names))
    # k and v read what q reads
    grams |= {layer_name(i, leaf): grams[layer_name(i, "q_proj")] for i in blocks for leaf in ("k_proj", "v_proj")}
    weights = {name: model.get_submodule(name).weight.detach() for name in grams}
    found = {(i, leaf): layer_name(i, leaf) for i in blocks for leaf in LEAVES if layer_name(i, leaf) in grams}
    data = {i: {leaf: (weights[n], grams[n]) for (j, leaf), n in found.items() if j == i} for i in blocks}
    norms = {i: {leaf: norm_weight(model.model.layers[i], leaf) for leaf in READERS} for i in blocks}
    if shared:
        given = {row["layer"] for row in file.rows if row.get("choice") == "given"}
        for row in shared_rows(data, norms, shared, args.layers, given):
            file.add([{"study": "rotate", **row}])
    else:
        file.rows = [row for row in file.rows if row["study"] != "rotate" or row["layer"] not in args.layers]
        covariance = 0
        for i in blocks:
            for gram in (folded(data[i], norms[i])[leaf][1] for leaf in ("q_proj", "gate_proj")):
                covariance = covariance + gram / gram.trace()
        for i in args.layers:
            for row in layer_rows(data[i], norms[i], covariance, model.config):
                file.add([{"study": "rotate", "layer": i, **row}])
    table([row for row in file.rows if row["study"] == "rotate"])


def open_results(path):
    """The file that other studies' rows are in too, with a protocol and an environment of this study's own."""
    protocol = (
        f"relative error on the {WINDOWS * SEQLEN} calibration tokens themselves, {ROUNDS} rounds, equal stored "
        f"numbers; the stream's covariance is the mean over the norms' outputs, without their weights, of all layers"
    )
    head = {"environment": environment()}
    if path.exists():
        head = {name: value for name, value in read_result(path).items() if name != "rows"}
    return ResultFile(path, {**head, "rotate": {"protocol": protocol, "environment": environment()}}, append=True)


def norm_weight(layer, leaf):
    """The weight of the norm whose output this projection reads."""
    return (layer.post_attention_layernorm if leaf in MLP else layer.input_layernorm).weight.detach()


if __name__ == "__main__":
    main()
