"""Time of projections that read one input (q, k and v; gate and up), one by one and together, dense and compressed.

    python benchmarks/groups.py [--tokens 1 1024] [--out benchmarks/results]

Clock and protocol are those of `layers.py`. Dense is the faster of one product for each projection and one product with
the concatenated weights. The result file is written after every case.
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
import triton
from layers import FUNCTIONS, PROTOCOL, Timer, one_row_a_line, relative_error

from hf_blr import ops
from hf_blr.cli.options import environment
from hf_blr.fusion import pack
from hf_blr.ops import reference
from hf_blr.structures import make_spec

TOKENS = (1, 16, 1024, 4096)
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


def make_group(structure, k, ns, blocks):
    """[{factor: tensor}] at half the parameters, ranks to the nearest multiple that the kernels like."""
    multiple, layers = (32 if structure == "monarch" else 16), []
    for n in ns:
        rank = make_spec(structure, k, n, ratio=0.5, num_blocks=blocks).rank
        spec = make_spec(structure, k, n, rank=max(1, round(rank / multiple)) * multiple, num_blocks=blocks)
        shapes = spec.factor_shapes()
        layers.append(
            {name: torch.randn(s, device="cuda", dtype=torch.bfloat16) * s[-1] ** -0.5 for name, s in shapes.items()}
        )
    return layers


def copies(layers, tokens, l2, packed):
    """The layers' factors, packed or apart; at few tokens in as many copies as make three times L2."""
    size = sum(t.numel() * t.element_size() for layer in layers for t in layer.values())
    count = 1 if tokens > 32 else 1 + math.ceil(3 * l2 / size)
    result = []
    for _ in range(count):
        copy = [{name: t.clone() for name, t in layer.items()} for layer in layers]
        if packed:
            pack(copy)
        result.append([tuple(layer.values()) for layer in copy])
    return result


def bench(group, tokens, timer):
    """The rows of one group at one number of tokens; without a timer, only compiles."""
    k, ns = GROUPS[group]
    torch.manual_seed(0)
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    l2 = torch.cuda.get_device_properties(0).L2_cache_size

    def measure(function, weights):
        if timer is None:
            function(weights[0])
            return math.nan
        return timer(function, weights, tokens > 32)

    dense = [{"weight": torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5} for n in ns]
    apart = copies(dense, tokens, l2, packed=False)
    dense_us = measure(lambda layers: [F.linear(x, w) for (w,) in layers], apart)
    together = [torch.cat([w for (w,) in layers]) for layers in apart]
    concatenated_us = measure(lambda w: F.linear(x, w), together)
    exact = x.double() @ together[0].double().T
    error = relative_error(F.linear(x, together[0]), exact)
    rows = [("dense", (1, 1), [min(k, n) for n in ns], "apart", dense_us, error)]
    rows += [("dense", (1, 1), [min(k, n) for n in ns], "together", concatenated_us, error)]
    del apart, together, exact
    for structure, blocks in FORMS:
        group_layers = make_group(structure, k, ns, blocks)
        single, eager = getattr(ops, FUNCTIONS[structure]), getattr(reference, FUNCTIONS[structure])
        exact = [eager(x.double(), *(t.double() for t in layer.values())) for layer in group_layers]
        for how in ("apart", "together"):

            def call(layers, how=how, structure=structure, single=single):
                with torch.no_grad():
                    if how == "apart":
                        return [single(x, *factors) for factors in layers]
                    return ops.siblings_linear(structure, x, layers)

            weights = copies(group_layers, tokens, l2, packed=how == "together")
            us = measure(call, weights)
            outs = call(weights[0])
            error = max(relative_error(out, e) for out, e in zip(outs, exact, strict=True))
            ranks = [layer["u"].shape[-1] // (blocks[0] if structure == "monarch" else 1) for layer in group_layers]
            rows.append((structure, blocks, ranks, how, us, error))
            del weights, outs
    keys = ("structure", "blocks", "ranks", "how", "us", "rel_error")
    best = min(dense_us, concatenated_us)
    return [
        {"group": group, "tokens": tokens, **dict(zip(keys, row, strict=True)), "dense_us": best}
        | {"speedup_vs_dense": best / row[4]}
        for row in rows
    ]


def compile_kernels(case):
    bench(*case, timer=None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile the kernels first")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    todo = list(itertools.product(args.groups, args.tokens))
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_kernels, todo))
    where = environment() | {"triton": triton.__version__} | ({"commit": args.commit} if args.commit else {})
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"groups_{where['device'].split()[1].lower()}.json"
    timer, rows = Timer(), []
    for case in todo:
        for row in bench(*case, timer):
            rows.append(row)
            what = f"{row['structure']:8} {row['blocks'][0]:2}x{row['blocks'][1]:<2} {row['how']:8}"
            speed = f"{row['us']:8.1f} us {row['speedup_vs_dense']:5.2f}x  error {row['rel_error']:.1e}"
            print(f"{row['group']:17} {row['tokens']:5} {what} {speed}", flush=True)
        result = {"environment": where, "dtype": "bfloat16", "protocol": PROTOCOL, "rows": rows}
        path.write_text(one_row_a_line(result))
    print(path)


if __name__ == "__main__":
    main()
