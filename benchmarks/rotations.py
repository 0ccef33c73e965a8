"""What the order of heads and rotations of values and of the residual stream buy in relative error on the activations.

    python benchmarks/rotations.py wikitext2/valid.txt [--layers 12 2 25] [--out benchmarks/results/symmetries.json]

Each projection is fitted as it is and after a change that leaves the model's outputs alone (`model_symmetries.py`), at
equal stored numbers. `ratio` near one in the table printed at the end: the change buys nothing.
"""

import argparse
import math
from pathlib import Path

import torch
from model_symmetries import READERS, changed, head_order, stream_rotation, value_rotation
from symmetries import (
    ATTENTION,
    LAYERS,
    MLP,
    RATIOS,
    ROUNDS,
    SEQLEN,
    WINDOWS,
    balanced_kmeans,
    error,
    layer_name,
    model_and_grams,
)

from hf_blr.environment import environment
from hf_blr.factorize import factorize
from hf_blr.ops.reference import DENSE
from hf_blr.results.files import ResultFile, read_result
from hf_blr.structures import make_spec

STRUCTURES = (("low_rank", (1, 1)), ("monarch", (4, 4)), ("blast", (4, 16)), ("blast", (16, 16)))
#: up reads what gate reads, and has its shape
LEAVES = (*ATTENTION, "gate_proj", "down_proj")
#: of the search for a rotation of the values: steps of Adam, its rate in radians, rounds of each fit on the way
STEPS, RATE, STEP_ROUNDS = 40, 0.01, 2


def random_rotation(*shape):
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))[0]


def principal(gram):
    """Rotation(s) to the principal axes of `[..., n, n]`, largest first."""
    return torch.linalg.eigh(gram)[1].flip(-1).mT


def dealt(size, hands):
    """An order that gives each of `hands` contiguous blocks every hands-th index."""
    return torch.arange(size).view(-1, hands).T.reshape(-1)


def value_choices(data, group, head_dim):
    """{name: rotations `[G, D, D]`} that depend on weights and inputs alone."""
    (value, gram), (output, _) = data["v_proj"], data["o_proj"]
    heads = value.view(-1, head_dim, value.shape[1])
    covariance = heads @ gram @ heads.mT
    columns = output.view(len(output), len(heads), group, head_dim).permute(1, 2, 0, 3)
    generator = torch.Generator().manual_seed(1)
    orders = torch.stack([torch.randperm(head_dim, generator=generator) for _ in heads])
    return {
        "random order of dimensions": torch.eye(head_dim)[orders],
        "random": random_rotation(len(heads), head_dim, head_dim),
        "principal axes of values": principal(covariance),
        "principal axes of values, dealt out": principal(covariance)[:, dealt(head_dim, 4)],
        "principal axes of o's columns": principal((columns.mT @ columns).sum(1)),
    }


def fitted_rotation(data, group, head_dim, structure, blocks):
    """Rotations of the values `[G, D, D]` that lower the errors of v and o at the smallest ratio: descent along the
    gradient of log error, with the factors fitted anew at every step."""
    kv_heads = len(data["v_proj"][0]) // head_dim
    angles = torch.zeros(kv_heads, head_dim, head_dim, requires_grad=True)
    optimizer = torch.optim.Adam([angles], RATE)
    best, kept = math.inf, None
    for _ in range(STEPS):
        rotations = torch.linalg.matrix_exp(angles - angles.mT)
        loss = 0
        for leaf, sides in value_rotation(rotations, group).items():
            weight, gram = changed(*data[leaf], sides)
            with torch.no_grad():
                spec = make_spec(structure, *reversed(weight.shape), ratio=RATIOS[0], num_blocks=blocks)
                factors = factorize(weight.contiguous(), spec, gram, rounds=STEP_ROUNDS, tolerance=0)
                near = DENSE[structure](**factors.tensors)
            rest = weight - near
            loss = loss + torch.log((rest @ gram * rest).sum())
        if loss.item() < best:
            best, kept = loss.item(), rotations.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return kept


def stream_choices(covariance):
    """{name: rotation `[K, K]`} for a stream with this covariance; the permutations come as matrices."""
    size = len(covariance)
    correlation = covariance / covariance.diagonal().sqrt() / covariance.diagonal().sqrt()[:, None]
    values, vectors = torch.linalg.eigh(correlation.square())
    embedding = vectors[:, -16:] * values[-16:].sqrt()
    embedding /= embedding.norm(dim=1, keepdim=True)
    order = balanced_kmeans(embedding, 16).argsort(stable=True)
    identity = torch.eye(size)
    permutations = {
        "random order": identity[torch.randperm(size, generator=torch.Generator().manual_seed(1))],
        "clustered by correlation": identity[order],
    }
    axes = principal(covariance)
    rotations = {
        "norms folded alone": identity,
        "random": random_rotation(size, size),
        "principal axes": axes,
        "principal axes, dealt out": axes[dealt(size, 16)],
    }
    return permutations, rotations


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
        change = value_rotation(fitted_rotation(data, group, head_dim, *structure), group)
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--layers", type=int, nargs="+", default=(12, *(i for i in LAYERS if i != 12)))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "symmetries.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    protocol = (
        f"relative error on the {WINDOWS * SEQLEN} calibration tokens themselves, {ROUNDS} rounds, equal stored "
        f"numbers; the stream's covariance is the mean over the norms' outputs, without their weights, of all layers"
    )
    head = {"environment": environment()}
    if args.out.exists():
        head = {name: value for name, value in read_result(args.out).items() if name != "rows"}
    file = ResultFile(args.out, {**head, "rotate": {"protocol": protocol, "environment": environment()}}, append=True)
    file.rows = [row for row in file.rows if row["study"] != "rotate" or row["layer"] not in args.layers]

    blocks = range(30)
    names = [layer_name(i, leaf) for i in blocks for leaf in ("q_proj", "gate_proj")]
    wanted = {(i, leaf): layer_name(i, leaf) for i in args.layers for leaf in ATTENTION + MLP}
    model, grams = model_and_grams(args.text, list({*names, *wanted.values()}))

    def norm_of(i, leaf):
        layer = model.model.layers[i]
        return (layer.post_attention_layernorm if leaf in MLP else layer.input_layernorm).weight.detach()

    covariance = 0
    for i in blocks:
        for leaf in ("q_proj", "gate_proj"):
            norm = norm_of(i, leaf)
            plain = grams[layer_name(i, leaf)] / norm / norm[:, None]
            covariance = covariance + plain / plain.trace()
    for i in args.layers:
        data = {leaf: (model.get_submodule(wanted[i, leaf]).weight.detach(), grams[wanted[i, leaf]]) for leaf in LEAVES}
        norms = {leaf: norm_of(i, leaf) for leaf in READERS}
        for row in layer_rows(data, norms, covariance, model.config):
            file.add([{"study": "rotate", "layer": i, **row}])
        table([row for row in file.rows if row["study"] == "rotate"])
        print("layer", i, flush=True)


if __name__ == "__main__":
    main()
