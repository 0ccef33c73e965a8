"""Time of a mixture's experts: Transformers' own dense forms, and factors at half the parameters.

    python benchmarks/experts.py [--tokens 1 16 1024] [--out benchmarks/results]

Experts are those of one layer of Qwen3-30B-A3B, with random weights and choices. A time is the median of CUDA-graph
replays; at few tokens a graph holds several calls whose tokens choose other experts, so that more is read than L2
holds. What waits for the host cannot be captured and is timed as it is called. The file is written after every row.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_blr import ops
from hf_blr.bench.environment import environment
from hf_blr.bench.layers import relative_error
from hf_blr.bench.report.files import ResultFile
from hf_blr.bench.timing import Timer
from hf_blr.experts import ExpertsLinear, put_layer
from hf_blr.structures import make_spec, structure_named

SIZES = {"num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048, "moe_intermediate_size": 768}
TOKENS = (1, 16, 1024)
FORMS = (("low_rank", None), ("pivoted", None), ("monarch", (4, 4)), ("blast", (4, 16)))
RATIO = 0.5
#: {how: rows that read for themselves at most}
HOW = {"kernel": 1 << 30, "sorted": 0}
#: calls in one graph at few tokens
CALLS = 8
PROTOCOL = (
    "median of CUDA-graph replays; up to 16 tokens a graph holds 8 calls whose tokens choose other experts, above, L2 "
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
    calls = CALLS if tokens <= max(TOKENS[:2]) else 1
    chosen = torch.rand(calls * tokens, count, device=device).argsort(1)[:, :each]
    if tokens == 1:
        chosen = torch.randperm(count, device=device)[: calls * each].view(calls, each)
    x = torch.randn(calls, tokens, SIZES["hidden_size"], device=device).to(dtype)
    weights = torch.rand(calls, tokens, each, device=device).softmax(-1).to(dtype)
    return list(zip(x, chosen.view(calls, tokens, each).contiguous(), weights, strict=True))


def row(experts: torch.nn.Module, given: list, timer: Timer, exact: torch.nn.Module, captured: bool = True) -> dict:
    """us of one call, the error against float64, and whether a CUDA graph holds it."""
    flush = len(given) == 1
    with torch.no_grad():
        x, chosen, weights = given[0]
        error = relative_error(experts(*given[0]), exact(x.double(), chosen, weights.double()))
        if captured:
            us = timer(lambda call: experts(*call), given, flush)
        else:
            us = timer.median(lambda: [experts(*call) for call in given], flush) * 1e6 / len(given)
    return {"us": us, "rel_error": error, "graph": captured and timer.on_gpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--structures", nargs="+", default=["dense", *(name for name, _ in FORMS)])
    parser.add_argument("--append", action="store_true", help="keep the rows that the file holds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    where, dtype = environment(), torch.bfloat16
    timer = Timer(args.device, seconds=0.3)
    file = ResultFile(
        args.out / "experts_h200.json",
        {"environment": where, "dtype": "bfloat16", "ratio": RATIO, "protocol": PROTOCOL, **SIZES},
        args.append,
    )
    calls = {tokens: inputs(tokens, args.device, dtype) for tokens in args.tokens}

    def measure(experts: torch.nn.Module, exact: torch.nn.Module, tokens: int, captured: bool, **said: object) -> None:
        found = row(experts, calls[tokens], timer, exact, captured)
        file.add([{"tokens": tokens, **said, **found}])
        print({"tokens": tokens, **said, **found}, flush=True)

    for tokens in args.tokens if "dense" in args.structures else ():
        experts = dense_experts(args.device, dtype)
        experts.config._experts_implementation = "eager"
        exact = copy.deepcopy(experts).double()
        for how in ("grouped_mm", "batched_mm", "eager"):
            # 1024 tokens by batches would copy 77 GB of weights
            if how == "batched_mm" and tokens > 16:
                continue
            experts.config._experts_implementation = how
            measure(experts, exact, tokens, how != "eager", structure="dense", ranks=None, blocks=None, how=how)
    for structure, blocks in FORMS:
        if structure not in args.structures:
            continue
        experts, ranks = factored_experts(structure, blocks, args.device, dtype)
        experts.config._experts_implementation = None
        exact = copy.deepcopy(experts).double()
        exact.config._experts_implementation = "eager"
        for tokens in args.tokens:
            for how, few_rows in HOW.items():
                if how == "kernel" and tokens > 16:
                    continue
                ops.experts.FEW_ROWS = few_rows
                measure(experts, exact, tokens, True, structure=structure, ranks=ranks, blocks=blocks, how=how)


if __name__ == "__main__":
    main()
