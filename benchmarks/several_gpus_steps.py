"""The steps of `several_gpus.py`, each of which torchrun starts in as many processes as there are GPUs to measure."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from several_gpus import MARK, add_options
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from hf_blr import BLRConfig, compress, fuse
from hf_blr.bench.forms import repeated_blocks
from hf_blr.bench.models import SHAPES
from hf_blr.bench.shapes import align_rank
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant, build_model, default_dtype
from hf_blr.compression.report import CompressionReport
from hf_blr.finetune.trainable import mark_only_factors_trainable
from hf_blr.linear import BLRLinear
from hf_blr.structures import structure_named

#: training steps, and those before them
TIMED, WARM_UP = 8, 3
#: of other text, whose predictions are compared
COMPARED = 512
TOKENS_PER_FORWARD = 16384
#: of a model that only loads libraries
SMALL = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--step", choices=list(STEPS))
    args = parser.parse_args()
    state = PartialState(cpu=args.device == "cpu")
    torch.manual_seed(0)
    found = STEPS[args.step](args, state)
    if state.is_main_process:
        print(MARK + json.dumps(found), flush=True)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def text(args: argparse.Namespace, model: nn.Module, sequences: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (sequences, length), generator=generator)


def compress_step(args: argparse.Namespace, state: PartialState) -> dict:
    """Seconds of the call; rank 0 keeps the predictions for the run with more processes."""
    with torch.device(state.device), default_dtype(torch.bfloat16):
        model = SHAPES[args.model].of_blocks(args.blocks).build(**args.sizes).eval()
    batches = text(args, model, args.sequences, args.length, 1).to(state.device)
    other = text(args, model, 1, COMPARED, 2).to(state.device)
    before = predictions(model, other)
    parts = list(batches.split(max(1, TOKENS_PER_FORWARD // args.length)))

    def run(model: nn.Module, batches: list[Tensor]) -> CompressionReport:
        config = BLRConfig("low_rank", ratio=0.7)
        shared = state.num_processes > 1
        return compress(model, config, calibration=batches, distributed=shared, progress=False)

    with torch.device(state.device), default_dtype(torch.bfloat16):
        small = SHAPES[args.model].of_blocks(1).build(**SMALL)
    run(small, list(torch.randint(SMALL["vocab_size"], (8, 256), device=state.device).split(4)))
    state.wait_for_everyone()
    start = now(state.device)
    report = run(model, parts)
    seconds = now(state.device) - start
    after = predictions(model, other)
    found = {
        "tokens": batches.numel(),
        "seconds": seconds,
        "layers": len(report.layers),
        "fit_seconds": sum(layer.seconds for layer in report.layers),
        "divergence_from_dense": divergence(before, after),
    }
    if args.device == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    kept = args.folder / "one.pt"
    specs = {layer.name: str(layer.spec) for layer in report.layers}
    if state.num_processes == 1:
        torch.save((after.cpu(), specs), kept)
    elif kept.exists():
        one, plan = torch.load(kept)
        found |= {"divergence_from_one_process": divergence(one.to(after), after), "same_plan": specs == plan}
    return found


@torch.no_grad()
def predictions(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits.float().log_softmax(-1)[0]


def divergence(wanted: Tensor, found: Tensor) -> float:
    """Mean KL(wanted || found) in nats a token."""
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True).item()


def ddp_step(args: argparse.Namespace, state: PartialState) -> dict:
    model = trained_model(args, state)
    wrapped = DistributedDataParallel(model) if state.num_processes > 1 else model
    return {"tokens_per_second": trained(args, state, wrapped, model)}


def fsdp2_step(args: argparse.Namespace, state: PartialState) -> dict:
    """Also whether a checkpoint of the gathered shards holds what the model computes."""
    model = trained_model(args, state)
    for block in repeated_blocks(model):
        fully_shard(block)
    fully_shard(model)
    found = {"tokens_per_second": trained(args, state, model, model)}
    tokens = text(args, model, 1, COMPARED, 2).to(state.device)
    model.eval()
    wanted = predictions(model, tokens)
    start = now(state.device)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if state.is_main_process:
        model.save_pretrained(args.folder / "gathered", state_dict=whole)
        found["gather_and_save_seconds"] = now(state.device) - start
        read = AutoModelForCausalLM.from_pretrained(args.folder / "gathered", dtype="auto").to(state.device)
        found["divergence_of_checkpoint"] = divergence(wanted, predictions(read, tokens))
        held = read.state_dict()
        # of tied tensors the gathered state names one
        found["same_bits_in_checkpoint"] = all(torch.equal(held[key].cpu(), t) for key, t in whole.items())
    state.wait_for_everyone()
    return found


def trained_model(args: argparse.Namespace, state: PartialState) -> nn.Module:
    """Low-rank with random factors, half of each projection kept; the factors alone train."""
    shape = SHAPES[args.model].of_blocks(args.blocks)
    variant = Variant.parse("low_rank")
    model = build_model(shape, variant, 0.5, str(state.device), torch.bfloat16, **args.sizes).train()
    mark_only_factors_trainable(model)
    return model


def trained(args: argparse.Namespace, state: PartialState, wrapped: nn.Module, model: nn.Module) -> float:
    """Tokens a second of all processes together."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, fused=args.device == "cuda")
    tokens = text(args, model, args.batch, args.length, 3 + state.process_index).to(state.device)
    start = 0.0
    for i in range(WARM_UP + TIMED):
        if i == WARM_UP:
            state.wait_for_everyone()
            start = now(state.device)
        wrapped(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state.wait_for_everyone()
    return tokens.numel() * state.num_processes * TIMED / (now(state.device) - start)


def placement_step(args: argparse.Namespace, state: PartialState) -> dict:
    """One process that sees all GPUs."""
    places = [f"cuda:{i % torch.cuda.device_count()}" for i in range(2)] if args.device == "cuda" else ["cpu", "cpu"]
    found: dict[str, Any] = {"places": places}
    for structure in ("low_rank", "blast:4x4"):
        shape, folder = SHAPES[args.model].of_blocks(args.blocks), args.folder / structure.partition(":")[0]
        model = build_model(shape, Variant.parse(structure), 0.5, places[0], torch.bfloat16, **args.sizes)
        model.save_pretrained(folder)
        tokens = text(args, model, 2, COMPARED, 2).to(places[0])
        del model
        half = args.blocks // 2
        spread = {"model.embed_tokens": places[0], "model.norm": places[1], "lm_head": places[1]}
        spread |= {f"model.layers.{i}": places[i >= half] for i in range(args.blocks)} | {"model.rotary_emb": places[0]}
        logits = []
        for device_map in ({"": places[0]}, spread):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device_map)
            groups = len(fuse(model))
            with torch.no_grad():
                logits.append(model(input_ids=tokens).logits.cpu())
            del model
        found[structure] = {"fused_groups": groups, "same_bits": torch.equal(*logits)}
    return found


def tensor_parallel_step(args: argparse.Namespace, state: PartialState) -> dict:
    """Why factors are not split over GPUs: what half of an MLP saves, and what the sum over GPUs takes."""
    with torch.device("meta"):
        config = SHAPES[args.model].of_blocks(1).build(**args.sizes).config
    hidden, inner = config.hidden_size, config.intermediate_size
    timer, rows = Timer(args.device), []
    for tokens in (1, 16, 2048):
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=state.device)
        whole, half = (mlp(hidden, inner, inner // parts, state.device) for parts in (1, 2))
        times = {"whole_us": timer(whole, [x], False), "half_us": timer(half, [x], False)}
        part = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=state.device)
        rows.append({"tokens": tokens, **times, "sum_us": timer(dist.all_reduce, [part], False)})
    return {"rows": rows}


def mlp(hidden: int, inner: int, own: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Of low-rank layers, half of each kept, with `own` of the inner features, at the ranks of all of them."""
    of = structure_named("low_rank").spec
    rank = align_rank(of(hidden, inner, of.rank_within(hidden * inner // 2, hidden, inner, (1, 1)))).rank
    sizes = ((hidden, own), (hidden, own), (own, hidden))
    gate, up, down = (
        BLRLinear.from_spec(of(k, n, rank), bias=False, device=device, dtype=torch.bfloat16) for k, n in sizes
    )

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        return down(F.silu(gate(x)) * up(x))

    return run


STEPS: dict[str, Callable[[argparse.Namespace, PartialState], dict]] = {
    "compress": compress_step,
    "ddp": ddp_step,
    "fsdp2": fsdp2_step,
    "placement": placement_step,
    "tensor_parallel": tensor_parallel_step,
}


if __name__ == "__main__":
    main()
