"""Time of a mixture's experts: Transformers' own dense forms, and factors at half the parameters.

    python benchmarks/experts.py [--structures dense low_rank] [--tokens 1 16 1024] [--out benchmarks/results]

Experts are those of one layer of Qwen3-30B-A3B, with random weights and choices. A time is the median of CUDA-graph
replays; at few tokens a graph holds several calls whose tokens choose other experts, so that more is read than L2
holds. What waits for the host cannot be captured and is timed as it is called. The file is written after every row.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_blr import ops, to_format
from hf_blr.bench.environment import environment
from hf_blr.bench.layers import relative_error
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.timing import Timer
from hf_blr.experts import ExpertsLinear, put_layer
from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.structures import make_spec, structure_named

SIZES = {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768}
TOKENS = (1, 4, 16, 64, 1024)
FORMS = (("low_rank", None), ("pivoted", None), ("monarch", (4, 4)), ("blast", (4, 16)))
RATIO = 0.5
#: factors in bits: whole rows share a scale, or groups that divide the ranks
FORMATS = (("int8", None), ("fp8", None), ("int4", 16))
#: Transformers' forms of dense experts, the loop last, and ours
DENSE, OURS = ("grouped_mm", "batched_mm", "eager"), ("kernel", "sorted")
#: tokens up to which each row may read its expert for itself
MOST_BY_ROWS = 64
#: calls in one graph at few tokens
CALLS = 8
PROTOCOL = (
    "median of CUDA-graph replays; up to 32 tokens a graph holds 8 calls whose tokens choose other experts, above, L2 "
    "is flushed before each replay"
)


def dense_experts(device: str, dtype: torch.dtype) -> Qwen3MoeExperts:
    experts = Qwen3MoeExperts(Qwen3MoeConfig(**SIZES)).to(device, dtype).requires_grad_(False)
    for weight in experts.parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5)
    return experts


def factored_experts(
    structure: str, blocks: tuple[int, int] | None, device: str, dtype: torch.dtype
) -> tuple[torch.nn.Module, dict[str, int]]:
    """Random factors, and the rank of each projection: to the nearest multiple that the kernels like."""
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"experts": Qwen3MoeExperts(Qwen3MoeConfig(**SIZES))})
    hidden, inner, ranks = SIZES["hidden_size"], SIZES["moe_intermediate_size"], {}
    record = structure_named(structure)
    for key, sizes in {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}.items():
        rank = make_spec(structure, *sizes, ratio=RATIO, num_blocks=blocks).rank
        ranks[key] = max(1, round(rank / record.rank_multiple)) * record.rank_multiple
        spec = make_spec(structure, *sizes, rank=ranks[key], num_blocks=blocks)
        layer = ExpertsLinear(spec, SIZES["num_experts"], device=device, dtype=dtype).requires_grad_(False)
        for index in layer.indices().values():
            index.copy_(torch.stack([torch.randperm(sizes[0]) for _ in index]))
        put_layer(model, f"experts.{key}", layer)
    return model["experts"], ranks


def inputs(tokens: int, device: str, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The calls of a graph: hidden states, choices and their weights; of one token no expert is chosen twice."""
    count, each = SIZES["num_experts"], SIZES["num_experts_per_tok"]
    calls = CALLS if tokens <= FEW_TOKENS else 1
    chosen = torch.rand(calls * tokens, count, device=device).argsort(1)[:, :each]
    if tokens == 1:
        chosen = torch.randperm(count, device=device)[: calls * each].view(calls, each)
    x = torch.randn(calls, tokens, SIZES["hidden_size"], device=device).to(dtype)
    weights = torch.rand(calls, tokens, each, device=device).softmax(-1).to(dtype)
    return list(zip(x, chosen.view(calls, tokens, each).contiguous(), weights, strict=True))


def with_formats(experts: torch.nn.Module, name: str, group: int | None) -> torch.nn.Module:
    """The same experts with their factors rounded to the nearest codes."""
    return to_format(copy.deepcopy(torch.nn.ModuleDict({"experts": experts})), name, group)["experts"]


def forward_of(experts: torch.nn.Module, how: str) -> Callable:
    """A forward of the experts, with or without the kernel for few rows."""
    experts.config._experts_implementation = how if how in DENSE else None

    def forward(call: tuple) -> torch.Tensor:
        ops.experts.FEW_ROWS = 1 << 30 if how == "kernel" else 0
        return experts(*call)

    return forward


def variants(structures: list[str], device: str, dtype: torch.dtype) -> Iterator[tuple[dict, torch.nn.Module, tuple]]:
    """(what rows say of it, experts, how they run) of all that is measured."""
    if "dense" in structures:
        said = {"structure": "dense", "blocks": None, "ranks": None, "format": "plain"}
        yield said, dense_experts(device, dtype), DENSE
    for structure, blocks in FORMS:
        if structure in structures:
            experts, ranks = factored_experts(structure, blocks, device, dtype)
            said = {"structure": structure, "blocks": blocks, "ranks": ranks}
            yield {**said, "format": "plain"}, experts, OURS
            for name, group in FORMATS if structure == "low_rank" else ():
                label = name if group is None else f"{name}, groups of {group}"
                yield {**said, "format": label}, with_formats(experts, name, group), OURS


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--structures", nargs="+", default=["dense", *(name for name, _ in FORMS)])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--warm", action="store_true", help="compile the kernels, and measure nothing")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    dtype, timer = torch.bfloat16, Timer(args.device, seconds=0.1)
    where = environment() | ({"commit": args.commit} if args.commit else {})
    head = {"environment": where, "dtype": "bfloat16", "ratio": RATIO, "protocol": PROTOCOL, **SIZES}
    file = ResultFile(None if args.warm else args.out / "experts_h200.json", head)
    calls = {tokens: inputs(tokens, args.device, dtype) for tokens in args.tokens}
    for said, experts, ways in variants(args.structures, args.device, dtype):
        for tokens in args.tokens:
            exact = None if args.warm else exact_of(experts, calls[tokens][0])
            for how in ways:
                # by batches or by rows, many tokens would read each expert many times
                if how in ("batched_mm", "kernel") and tokens > MOST_BY_ROWS:
                    continue
                forward = forward_of(experts, how)
                if args.warm:
                    forward(calls[tokens][0])
                    continue
                error = relative_error(forward(calls[tokens][0]), exact)
                flush = len(calls[tokens]) == 1
                if how == "eager":
                    us = timer.median(partial(forward, calls[tokens][0]), flush) * 1e6
                else:
                    us = timer(forward, calls[tokens], flush)
                row = {
                    "tokens": tokens,
                    **said,
                    "how": how,
                    "us": us,
                    "rel_error": error,
                    "graph": timer.on_gpu and how != "eager",
                }
                file.add([row])
                print(row, flush=True)


def exact_of(experts: torch.nn.Module, call: tuple) -> torch.Tensor:
    """What the experts give in float64, one after the other."""
    wide = copy.deepcopy(experts).double()
    wide.config = type("Eager", (), {"_experts_implementation": "eager"})()
    x, chosen, weights = call
    return wide(x.double(), chosen, weights.double())


if __name__ == "__main__":
    main()
