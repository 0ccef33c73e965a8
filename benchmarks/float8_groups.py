"""Times projections that read one input in float8, one by one and together: `python benchmarks/float8_groups.py`.

Low-rank at half of Llama-3-8B's q, k, v and of its gate and up, beside dense in bfloat16 and in float8, each dense the
faster of one product for each projection and one with the concatenated weights. Casts are counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from conditions import RESULTS
from float8_training import head_of
from torch import Tensor, nn

import hf_blr
from hf_blr.bench.environment import environment
from hf_blr.bench.in_bits import float8_dense
from hf_blr.bench.layers import relative_error
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.shapes import aligned_spec
from hf_blr.bench.timing import Timer
from hf_blr.formats import FORMATS
from hf_blr.linear import BLRLinear

#: {group: {projection: out features}}
GROUPS = {
    "Llama-3-8B q,k,v": {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024},
    "Llama-3-8B gate,up": {"gate_proj": 14336, "up_proj": 14336},
}
K = 4096


def layers_of(group: str, storage: str) -> nn.Module:
    """The projections of a group, random, low-rank at half."""
    block = nn.Module()
    for name, n in GROUPS[group].items():
        spec = aligned_spec("low_rank", K, n, 0.5)
        settings = {"device": "cuda", "dtype": torch.bfloat16, "storage": FORMATS[storage]}
        block.add_module(name, BLRLinear.from_spec(spec, bias=False, **settings).eval().requires_grad_(False))
    return block


def dense_times(group: str, x: Tensor, timer: Timer) -> dict[str, float]:
    """us of the faster way to run dense, in bfloat16 and in float8."""
    weights = [torch.randn(n, K, device="cuda", dtype=torch.bfloat16) * K**-0.5 for n in GROUPS[group].values()]
    joined = torch.cat(weights)
    found = {
        "dense_us": min(
            timer(lambda ws: [F.linear(x, w) for w in ws], [weights], flush=True),
            timer(lambda w: F.linear(x, w), [joined], flush=True),
        )
    }
    # of several products the first alone casts
    whole, parts = float8_dense(joined), [float8_dense(w)[1] for w in weights]

    def apart(stored: list) -> list[Tensor]:
        (w, w_scale), *others = stored
        scale = x.float().abs().amax(-1, keepdim=True) / 448
        rows = (x.float() / scale).to(torch.float8_e4m3fn)
        return [product(rows, w, scale, w_scale), *(product(rows, o, scale, s) for o, s in others)]

    compiled = torch.compile(apart, dynamic=False)
    found["dense_fp8_us"] = min(
        timer(lambda stored: whole[0](x, *stored), [whole[1]], flush=True),
        timer(compiled, [parts], flush=True),
    )
    return found


def product(rows: Tensor, w: Tensor, scale: Tensor, w_scale: Tensor) -> Tensor:
    return torch._scaled_mm(rows, w.T, scale, w_scale.T, out_dtype=torch.bfloat16, use_fast_accum=True)


def group_rows(group: str, tokens: int, timer: Timer) -> list[dict]:
    torch.manual_seed(0)
    x = torch.randn(tokens, K, device="cuda", dtype=torch.bfloat16)
    row = {"measured": "group", "group": group, "tokens": tokens} | dense_times(group, x, timer)
    rows = []
    for storage in ("plain", "fp8"):
        block = layers_of(group, storage)
        modules = list(block.children())
        exact = [x.double() @ module.dense_weight(torch.float64).T for module in modules]
        for how in ("apart", "together"):
            if how == "together":
                hf_blr.fuse(block)
            us = timer(lambda held: [module(x) for module in held], [modules], flush=True)
            error = max(relative_error(module(x), wanted) for module, wanted in zip(modules, exact, strict=True))
            rows.append(row | {"format": storage, "how": how, "us": us, "rel_error": error})
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 1024])
    parser.add_argument("--json", type=Path, default=RESULTS / "float8_h200.json")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    where = environment() | ({"commit": args.commit} if args.commit else {})
    file = ResultFile(args.json, head_of(args.json, where), append=True)
    file.rows = [row for row in file.rows if row["measured"] != "group"]
    timer = Timer("cuda", seconds=0.3)
    for group in GROUPS:
        for tokens in args.tokens:
            rows = [row | {"commit": where["commit"]} for row in group_rows(group, tokens, timer)]
            file.add(rows)
            for row in rows:
                print({key: row[key] for key in row if key != "commit"}, flush=True)


if __name__ == "__main__":
    main()
