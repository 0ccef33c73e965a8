"""Time of one layer, dense and compressed, for every layer of the paper's table (arXiv 2512.20861).

    python benchmarks/layers.py [--models Llama-7B ...] [--out benchmarks/results]

All of a layer's rows come from one process. A time is the median over replays of a CUDA graph. Up to 32
tokens the graph runs the layer once with each of several weight copies, more than the L2 cache holds, and the
time is per copy; above, the graph runs it once and L2 is overwritten before each replay. `rel_error` is
against float64 with the same weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

from hf_blr import ops
from hf_blr.cli.options import environment
from hf_blr.ops import reference

PROTOCOL = (
    "median of CUDA-graph replays; up to 32 tokens weights rotate through more than L2, "
    "above, L2 is flushed before each replay"
)
TOKENS = (1, 16, 128, 1024, 4096)
# model: {layer: (K, N, rank of low-rank and BLAST, total rank and blocks of Monarch, blocks of BLAST)}
LAYERS = {
    "Llama-7B": {
        "q,k,v,o": (4096, 4096, 1024, (1024, 16), 16),
        "gate,up": (4096, 11008, 1488, (1536, 16), 16),
        "down": (11008, 4096, 1488, (1536, 16), 16),
    },
    "Llama-3.2-1B": {
        "q,o": (2048, 2048, 256, (256, 16), 16),
        "gate": (2048, 8192, 512, (512, 16), 16),
        "up": (2048, 8192, 768, (768, 16), 16),
        "down": (8192, 2048, 768, (768, 16), 16),
    },
    "GPT2-S": {
        "c_attn": (768, 2304, 192, (192, 4), 6),
        "c_fc": (768, 3072, 192, (192, 4), 6),
        "mlp.c_proj": (3072, 768, 192, (192, 4), 6),
    },
    "ViT-B": {
        "qkv": (768, 2304, 128, (128, 4), 3),
        "fc1": (768, 3072, 128, (128, 4), 3),
        "fc2": (3072, 768, 128, (128, 4), 3),
    },
    "DiT-XL/2": {
        "qkv": (1152, 3456, 384, None, 9),
        "fc1": (1152, 4608, 256, None, 9),
        "adaLN": (1152, 6912, 256, None, 9),
    },
}
FUNCTIONS = {"low_rank": "low_rank_linear", "monarch": "monarch_linear", "blast": "blast_linear"}


def structures(model, layer):
    """(structure, (B1, B2), rank) of one layer: the paper's blocks, and fewer or unequal ones."""
    k, n, rank, monarch, blast = LAYERS[model][layer]
    rows = [("low_rank", (1, 1), rank)]
    if monarch:
        rows += [("monarch", (b, b), monarch[0] // b) for b in sorted({monarch[1], 4})]
    blocks = {(blast, blast), (4, 4), (2, 16), (4, 16), (4, 32)} if "Llama" in model else {(blast, blast), (4, 4)}
    rows += [("blast", b, rank) for b in sorted(blocks) if k % b[0] == 0 and n % b[1] == 0]
    return rows


def make_factors(structure, k, n, blocks, rank):
    (b1, b2), shapes = blocks, []
    if structure == "low_rank":
        shapes = [(n, rank), (rank, k)]
    elif structure == "monarch":
        shapes = [(b2, n // b2, b1 * rank), (b1, b2 * rank, k // b1)]
    else:
        shapes = [(b2, n // b2, rank), (b2, b1, rank), (b1, rank, k // b1)]
    return [torch.randn(s, device="cuda", dtype=torch.bfloat16) * s[-1] ** -0.5 for s in shapes]


class Timer:
    def __init__(self):
        self.l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(4 * self.l2 // 4, device="cuda")

    def __call__(self, function, weights, flush, replays=20):
        """Microseconds of one call; `function` is called with each of `weights` inside one graph."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for _ in range(2):
                function(weights[0])
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for w in weights:
                    function(w)
        graph.replay()
        events = []
        for _ in range(replays):
            if flush:
                self.flush.add_(1)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(s.elapsed_time(e) for s, e in events) * 1e3 / len(weights)

    def copies(self, weights, tokens):
        """The weights; at few tokens, where reading them is the work, in copies of three times L2."""
        if tokens > 32:
            return [weights]
        size = sum(w.numel() * w.element_size() for w in weights)
        # at most 64, so that the smallest layers do not make the largest graphs
        return [
            weights,
            *([w.clone() for w in weights] for _ in range(min(64, math.ceil(3 * self.l2 / size)))),
        ]


def relative_error(out, exact):
    return ((out.double() - exact).norm() / exact.norm()).item()


def forward_and_backward(function, x, grad):
    x = x.detach().requires_grad_()

    def step(weights):
        weights = [w.detach().requires_grad_() for w in weights]
        out = function(x, *weights)
        torch.autograd.grad(out, (x, *weights), grad)

    return step


def bench_layer(model, layer, tokens, direction, timer, compile_only=False):
    k, n = LAYERS[model][layer][:2]
    torch.manual_seed(0)
    x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16)
    flush = tokens > 32

    def measure(function, weights):
        if direction == "forward":

            def call(w):
                with torch.no_grad():
                    return function(x, *w)
        else:
            call = forward_and_backward(function, x, grad)
        if compile_only:
            call(weights)
            return math.nan
        return timer(call, timer.copies(weights, tokens), flush)

    rows = []
    dense = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5]
    exact = x.double() @ dense[0].double().T
    times = {"dense": measure(F.linear, dense)}
    rows.append(("dense", (1, 1), min(k, n), "cublas", times["dense"], relative_error(F.linear(x, dense[0]), exact)))
    del dense, exact
    for structure, blocks, rank in structures(model, layer):
        weights = make_factors(structure, k, n, blocks, rank)
        eager = getattr(reference, FUNCTIONS[structure])
        ours = getattr(ops, FUNCTIONS[structure])
        exact = eager(x.double(), *(w.double() for w in weights))
        impls = {"hf_blr": ours}
        paper = structure == "low_rank" or blocks in ((16, 16), (6, 6), (3, 3), (9, 9))
        if structure == "low_rank" or (paper and tokens in (1, 1024)):
            impls["eager"] = eager
        for impl, function in impls.items():
            microseconds = measure(function, weights)
            if structure == "low_rank" and impl == "eager":
                times["low_rank"] = microseconds
            rows.append((structure, blocks, rank, impl, microseconds, relative_error(function(x, *weights), exact)))
    keys = ("structure", "blocks", "rank", "impl", "us", "rel_error")
    return [
        {
            "model": model,
            "layer": layer,
            "tokens": tokens,
            "direction": direction,
            **dict(zip(keys, row, strict=True)),
        }
        | {
            "dense_us": times["dense"],
            "lowrank_us": times["low_rank"],
            "speedup_vs_dense": times["dense"] / row[4],
        }
        for row in rows
    ]


def cases(models):
    for model in models:
        for layer, tokens in itertools.product(LAYERS[model], TOKENS):
            yield model, layer, tokens, "forward"
        if "Llama" in model:
            yield from ((model, layer, 4096, "forward+backward") for layer in LAYERS[model])


def compile_kernels(case):
    bench_layer(*case, timer=None, compile_only=True)


def one_row_a_line(result):
    """JSON that can be read and compared line by line."""
    *head, (_, rows) = result.items()
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head]
    return "\n".join(["{", *lines, ' "rows": [', ",\n".join(f"  {json.dumps(r)}" for r in rows), " ]", "}", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile the kernels first")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    todo = list(cases(args.models))
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_kernels, todo))
    timer, rows = Timer(), []
    for case in todo:
        rows += bench_layer(*case, timer)
        for row in (r for r in rows if (r["model"], r["layer"], r["tokens"], r["direction"]) == case):
            where = f"{row['model']:13} {row['layer']:10} {row['tokens']:5} {row['direction'][7:]:9}"
            what = f"{row['structure']:8} {row['blocks'][0]:2}x{row['blocks'][1]:<2} {row['impl']:6}"
            speed = f"{row['us']:8.1f} us {row['speedup_vs_dense']:5.2f}x  error {row['rel_error']:.1e}"
            print(where, what, speed, flush=True)
    where = environment() | {"triton": triton.__version__} | ({"commit": args.commit} if args.commit else {})
    result = {"environment": where, "dtype": "bfloat16", "protocol": PROTOCOL, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"layers_{where['device'].split()[1].lower()}.json"
    path.write_text(one_row_a_line(result))
    print(path)


if __name__ == "__main__":
    main()
