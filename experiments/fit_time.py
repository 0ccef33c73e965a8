"""Seconds and memory of compressing a model of a known shape, by its first layers; random weights and tokens.

    python experiments/fit_time.py [--model Llama-7B] [--layers 2] [--structure blast --blocks 16 16]

A fit goes through a model layer by layer, each like the others: the whole model's time is that of one layer times their
number. Time depends on how many tokens there are and not on which. Weights are drawn with a spectrum that falls like a
trained matrix's, as the number of rounds of a fit depends on it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.bench.environment import environment
from hf_blr.bench.models import SHAPES
from hf_blr.bench.report.files import ResultFile
from hf_blr.targets import find_targets

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

#: singular value i of a weight is i^-DECAY of the first; trained projections have 0.3 to 0.6
DECAY = 0.4


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Llama-7B", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, default=2, help="of the model's, to measure")
    parser.add_argument("--structure", default="blast")
    parser.add_argument("--blocks", type=int, nargs=2, default=(16, 16))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--json", type=Path, default=RESULTS / "fit_time.json")
    args = parser.parse_args(argv)
    shape, device = SHAPES[args.model], torch.device(args.device)
    with torch.device("meta"):
        whole = shape.build().config.num_hidden_layers
    torch.manual_seed(0)
    with device:
        model = shape.build(num_hidden_layers=args.layers).to(getattr(torch, args.dtype)).eval()
    names = find_targets(model)
    for name in names:
        give_spectrum(model.get_submodule(name).weight)
    ids = torch.randint(0, model.config.vocab_size, (args.windows, args.seqlen), device=device)
    batches = list(ids.split(max(1, 16384 // args.seqlen)))
    blocks = None if args.structure in ("low_rank", "pivoted", "auto") else tuple(args.blocks)
    config = BLRConfig(args.structure, ratio=args.ratio, num_blocks=blocks)
    started = clock(device)
    statistics = collect_statistics(model, config, calibration=batches)
    collected = clock(device)
    compress(model, config, calibration=batches, statistics=statistics, progress=False)
    seconds = {"statistics_seconds": collected - started, "fit_seconds": clock(device) - collected}
    row = {
        "model": args.model,
        "structure": args.structure,
        "blocks": blocks,
        "ratio": args.ratio,
        "dtype": args.dtype,
        "matrices": len(names),
        "layers": args.layers,
        "of_layers": whole,
        "calibration_tokens": ids.numel(),
        **seconds,
        "whole_model_seconds": sum(seconds.values()) / args.layers * whole,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
    print(row)
    machine = environment()
    head = {"protocol": " ".join(__doc__.split("\n\n")[2].split())}
    head["environment"] = {**machine, "commit": args.commit or machine["commit"]}
    ResultFile(args.json, head, append=True).add([row])


@torch.no_grad()
def give_spectrum(weight: torch.Tensor):
    """Scales the singular values of a random matrix, in place; its mean square stays."""
    n = min(weight.shape)
    basis = torch.linalg.qr(torch.randn(n, n, device=weight.device))[0]
    sizes = torch.arange(1, n + 1, device=weight.device).float().pow(-DECAY)
    mixed = basis * sizes / sizes.square().mean().sqrt()
    wide = weight.float()
    weight.copy_(mixed @ (basis.mT @ wide) if weight.shape[0] == n else (wide @ basis) @ mixed.mT)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
