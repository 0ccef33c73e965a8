"""What the order of MLP channels and a storage without gauge freedom buy in relative error on the activations.

    python experiments/symmetries.py wikitext2/valid.txt [--out benchmarks/results/symmetries.json]

`reorder`: gate, up and down fitted with their shared channels in several orders. `storage`: the rank that the same
number of stored values buys when a factor pair of rank r costs r (m + n) - r^2 instead of r (m + n).
Order of heads, rotations of values and of the residual stream: `rotations.py`.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import ResultFile, read_result
from hf_blr.calibration.blockwise import whole_model_grams
from hf_blr.cli.demo_model import GGUF_FILE, demo_model_folder
from hf_blr.factorize import FitOptions, factorize
from hf_blr.structures import make_spec, structure_named

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

LAYERS, WINDOWS, SEQLEN, ROUNDS, RATIOS = (2, 12, 25), 16, 512, 6, (0.5, 0.8)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
STRUCTURES = (("monarch", (4, 4)), ("blast", (4, 16)))


def load(text_file):
    """{(layer, leaf): (weight, Gram)} of the chosen layers."""
    names = {(layer, leaf): layer_name(layer, leaf) for layer in LAYERS for leaf in ATTENTION + MLP}
    model, grams = model_and_grams(text_file, list(names.values()))
    return {key: (model.get_submodule(name).weight.detach(), grams[name]) for key, name in names.items()}


def layer_name(layer, leaf):
    return f"model.layers.{layer}.{'mlp' if leaf in MLP else 'self_attn'}.{leaf}"


def model_and_grams(text_file, names):
    """The model, and {name: Gram} of these layers; windows are spread over the first 200 000 characters."""
    folder = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32).eval()
    text = Path(text_file).read_text()
    for mark, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, plain)
    ids = tokenizer(text[:200_000], return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    windows = windows[:: len(windows) // WINDOWS][:WINDOWS]
    return model, whole_model_grams(model, names, [{"input_ids": part} for part in windows.split(2)])


def error(weight, gram, structure, rank, blocks):
    # not make_spec, which refuses a rank whose plain storage exceeds the dense matrix
    spec = structure_named(structure).spec(weight.shape[1], weight.shape[0], rank, blocks)
    return factorize(weight, spec, gram, options=FitOptions(rounds=ROUNDS, tolerance=0)).rel_error


def channel_orders(down, gram):
    """Permutations of the MLP channels, by what they follow."""
    n = len(gram)
    rms = gram.diagonal().sqrt()
    values, vectors = torch.linalg.eigh((gram / rms / rms[:, None]).square())
    embedding = vectors[:, -8:] * values[-8:].sqrt()
    embedding /= embedding.norm(dim=1, keepdim=True)
    clustered = balanced_kmeans(embedding, 4).argsort(stable=True)
    return {
        "given": torch.arange(n),
        "random": torch.randperm(n, generator=torch.Generator().manual_seed(1)),
        "clustered by activations": clustered,
        "spread": clustered.view(4, -1).T.reshape(-1),
        "sorted by energy": (down.norm(dim=0) * rms).argsort(),
    }


def balanced_kmeans(points, clusters, rounds=20):
    """Labels of equal-sized clusters: members are only ever exchanged between two clusters, while both gain."""
    labels = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)) % clusters
    for _ in range(rounds):
        centres = torch.stack([points[labels == c].mean(0) for c in range(clusters)])
        cost = torch.cdist(points, centres).square()
        for i in range(clusters):
            for j in range(i + 1, clusters):
                a, b = (labels == i).nonzero()[:, 0], (labels == j).nonzero()[:, 0]
                gain_a, best_a = (cost[a, i] - cost[a, j]).sort(descending=True)
                gain_b, best_b = (cost[b, j] - cost[b, i]).sort(descending=True)
                count = int((gain_a + gain_b > 0).sum())
                labels[a[best_a[:count]]], labels[b[best_b[:count]]] = j, i
    return labels


def reorder_rows(data, layer):
    gram = data[layer, "down_proj"][1]
    for order, index in channel_orders(data[layer, "down_proj"][0], gram).items():
        for leaf in MLP:
            weight, gram = data[layer, leaf]
            if leaf == "down_proj":
                weight, gram = weight[:, index], gram[index][:, index]
            else:
                weight = weight[index]
            for structure, blocks in STRUCTURES:
                for ratio in RATIOS if structure == "monarch" else RATIOS[:1]:
                    rank = make_spec(structure, *reversed(weight.shape), ratio=ratio, num_blocks=blocks).rank
                    found = error(weight, gram, structure, rank, blocks)
                    row = {"layer": layer, "module": leaf, "structure": structure, "blocks": blocks, "ratio": ratio}
                    yield {**row, "order": order, "rel_error": found}


def storage_rows(data, layer):
    for leaf in ATTENTION + MLP:
        weight, gram = data[layer, leaf]
        for structure, blocks in (("low_rank", (1, 1)), STRUCTURES[0]):
            for ratio in RATIOS:
                rank = make_spec(structure, *reversed(weight.shape), ratio=ratio, num_blocks=blocks).rank
                q, p = weight.shape[0] // blocks[1], weight.shape[1] // blocks[0]
                # the largest r with r (p + q) - r^2 <= ratio p q
                pivoted = int(((p + q) - math.sqrt((p + q) ** 2 - 4 * ratio * p * q)) / 2)
                row = {"layer": layer, "module": leaf, "structure": structure, "ratio": ratio, "rank": rank}
                plain = error(weight, gram, structure, rank, blocks)
                better = error(weight, gram, structure, pivoted, blocks)
                yield {**row, "pivoted_rank": pivoted, "rel_error": plain, "pivoted_rel_error": better}


def free_numbers(b1, b2, p, q, r):
    """(stored, free) numbers of BLAST, the latter as the rank of the Jacobian of (u, s, v) -> W at a random point."""
    shapes = (b2, q, r), (b2, b1, r), (b1, r, p)
    generator = torch.Generator().manual_seed(0)
    factors = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    blocks = torch.func.jacrev(lambda *f: torch.einsum("iqr,ijr,jrp->iqjp", *f).reshape(-1), (0, 1, 2))(*factors)
    jacobian = torch.cat([block.flatten(1) for block in blocks], 1)
    return jacobian.shape[1], int(torch.linalg.matrix_rank(jacobian))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("--out", type=Path, default=RESULTS / "symmetries.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    protocol = (
        f"relative error on the {WINDOWS * SEQLEN} calibration tokens themselves, {ROUNDS} rounds, equal stored "
        f"numbers; layers {', '.join(map(str, LAYERS))} as far as there are rows"
    )
    before = read_result(args.out) if args.out.exists() else {}
    file = ResultFile(args.out, {**before, "protocol": protocol, "environment": environment()}, append=True)
    # the rows of rotations.py stay
    file.rows = [row for row in file.rows if row["study"] == "rotate"]
    for sizes in ((2, 2, 8, 8, 4), (3, 4, 7, 6, 5), (4, 4, 6, 6, 3)):
        stored, free = free_numbers(*sizes)
        file.add([{"study": "gauge", "structure": "blast", "b1,b2,p,q,r": sizes, "stored": stored, "free": free}])
    data = load(args.text)
    for layer in LAYERS:
        file.add([{"study": "storage", **row} for row in storage_rows(data, layer)])
        file.add([{"study": "reorder", **row} for row in reorder_rows(data, layer)])
        print("layer", layer, flush=True)


if __name__ == "__main__":
    main()
