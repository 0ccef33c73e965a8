"""Time of projections that read one input (q, k and v; gate and up), one by one and together, dense and compressed.

    python benchmarks/groups.py [--tokens 1 1024] [--out benchmarks/results]

Clock and protocol are those of `hf-blr bench layers`. Dense is the faster of one product for each projection and one
product with the concatenated weights. The result file is written after every case.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from hf_blr import ops
from hf_blr.bench.environment import environment
from hf_blr.bench.layers import PROTOCOL, relative_error
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.timing import Timer
from hf_blr.inference.fusion import pack
from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, make_spec, structure_named

TOKENS = (1024, 1, 4096, 16)
#: group: (K, N of each projection)
GROUPS = {
    "Llama-7B q,k,v": (4096, (4096, 4096, 4096)),
    "Llama-3-8B q,k,v": (4096, (4096, 1024, 1024)),
    "Llama-7B gate,up": (4096, (11008, 11008)),
}
FORMS = (
    ("low_rank", (1, 1)),
    ("monarch", (4, 4)),
    ("monarch", (16, 16)),
    ("blast", (4, 4)),
    ("blast", (4, 16)),
    ("blast", (16, 16)),
)


def group_specs(group, structure, blocks):
    """The specs at half the parameters, ranks to the nearest multiple that the kernels like."""
    k, ns = GROUPS[group]
    multiple = structure_named(structure).rank_multiple
    ranks = [make_spec(structure, k, n, ratio=0.5, num_blocks=blocks).rank for n in ns]
    ranks = [max(1, round(rank / multiple)) * multiple for rank in ranks]
    return [make_spec(structure, k, n, rank=r, num_blocks=blocks) for n, r in zip(ns, ranks, strict=True)]


def random_layers(shapes):
    """[{factor: tensor}], scaled so that outputs stay near one."""

    def factor(shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * shape[-1] ** -0.5

    return [{name: factor(shape) for name, shape in layer.items()} for layer in shapes]


def copies(layers, tokens, l2, packed):
    """The layers' factors, packed or apart; at few tokens in as many copies as make three times L2."""
    size = sum(t.numel() * t.element_size() for layer in layers for t in layer.values())
    count = 1 if tokens > FEW_TOKENS else 1 + math.ceil(3 * l2 / size)
    result = []
    for _ in range(count):
        copy = [{name: t.clone() for name, t in layer.items()} for layer in layers]
        if packed:
            pack(copy)
        result.append([tuple(layer.values()) for layer in copy])
    return result


def calls(structure, x):
    """{how: a function of the layers' factors}"""
    single = ops.linear_of(structure)

    @torch.no_grad()
    def apart(layers):
        return [single(x, *factors) for factors in layers]

    @torch.no_grad()
    def together(layers):
        return ops.grouped_linear(structure, x, layers)

    return {"apart": apart, "together": together}


def compile_kernels(case):
    """Everything of one case once, so that the kernels are on disk."""
    group, tokens = case
    x = torch.randn(tokens, GROUPS[group][0], device="cuda", dtype=torch.bfloat16)
    for structure, blocks in FORMS:
        layers = random_layers([spec.shapes(FACTOR) for spec in group_specs(group, structure, blocks)])
        for how, call in calls(structure, x).items():
            call(copies(layers, FEW_TOKENS + 1, 0, packed=how == "together")[0])


def bench(group, tokens, timer):
    """The rows of one group at one number of tokens."""
    k, ns = GROUPS[group]
    torch.manual_seed(0)
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    flush = tokens > FEW_TOKENS
    apart = copies(random_layers([{"weight": (n, k)} for n in ns]), tokens, timer.l2, packed=False)
    together = [torch.cat([w for (w,) in layers]) for layers in apart]
    dense_us = {
        "apart": timer(lambda layers: [F.linear(x, w) for (w,) in layers], apart, flush),
        "together": timer(lambda w: F.linear(x, w), together, flush),
    }
    error = relative_error(F.linear(x, together[0]), x.double() @ together[0].double().T)
    rows = [("dense", (1, 1), [min(k, n) for n in ns], how, us, error) for how, us in dense_us.items()]
    del apart, together
    for structure, blocks in FORMS:
        specs = group_specs(group, structure, blocks)
        layers = random_layers([spec.shapes(FACTOR) for spec in specs])
        eager = implementation_of(structure).linear
        exact = [eager(x.double(), *(t.double() for t in layer.values())) for layer in layers]
        for how, call in calls(structure, x).items():
            weights = copies(layers, tokens, timer.l2, packed=how == "together")
            us = timer(call, weights, flush)
            error = max(relative_error(out, e) for out, e in zip(call(weights[0]), exact, strict=True))
            rows.append((structure, blocks, [spec.rank for spec in specs], how, us, error))
    keys = ("structure", "blocks", "ranks", "how", "group_us", "rel_error")
    best = min(dense_us.values())
    return [
        {"group": group, "tokens": tokens, **dict(zip(keys, row, strict=True))}
        | {"dense_us": best, "speedup_vs_dense": best / row[4]}
        for row in rows
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile the kernels first")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    todo = [(group, tokens) for tokens, group in itertools.product(args.tokens, args.groups)]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_kernels, todo))
    where = environment() | ({"commit": args.commit} if args.commit else {})
    path = args.out / f"groups_{where['device'].split()[1].lower()}.json"
    results = ResultFile(path, {"environment": where, "dtype": "bfloat16", "protocol": PROTOCOL})
    timer = Timer("cuda", seconds=0.3)
    for case in todo:
        rows = bench(*case, timer)
        results.add(rows)
        for row in rows:
            what = f"{row['structure']:8} {row['blocks'][0]:2}x{row['blocks'][1]:<2} {row['how']:8}"
            speed = f"{row['group_us']:8.1f} us {row['speedup_vs_dense']:5.2f}x  error {row['rel_error']:.1e}"
            print(f"{row['group']:17} {row['tokens']:5} {what} {speed}", flush=True)
    print(path)


if __name__ == "__main__":
    main()
