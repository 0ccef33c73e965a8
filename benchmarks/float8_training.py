"""Times a training step in float8 beside 16 bits, dense and low-rank: `python benchmarks/float8_training.py`.

Decoder blocks of Llama-3-8B's shape without embeddings' gradients and without a head; random weights. Each row has a
process of its own: all compile at once, and take turns in rounds, as in `decode_in_bits`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from multiprocessing.synchronize import Barrier, Lock, Semaphore
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conditions import RESULTS
from decode_in_bits import ROUNDS
from dense_float8 import Float8Linear
from torch import Tensor, nn
from turns import Turns, in_turns

from hf_blr.bench.environment import environment
from hf_blr.bench.measure import training
from hf_blr.bench.models import SHAPES
from hf_blr.bench.report.files import ResultFile, read_result
from hf_blr.bench.rivals import missing, train_by_torchao
from hf_blr.bench.rows import in_one_line
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant, build_model
from hf_blr.finetune.float8 import open_float8
from hf_blr.ops.float8_training import linear_in_float8
from hf_blr.targets import find_targets

MODEL = "Llama-3-8B"
#: (variant, in what its layers multiply: the model's dtype, float8 by this package or these benchmarks, or by torchao)
STEPS = (
    ("dense", "plain"),
    ("low_rank", "plain"),
    ("low_rank", "float8"),
    ("low_rank@128", "float8"),
    ("dense", "float8"),
    ("dense", "torchao"),
)
PROTOCOL = (
    "random weights, half of each projection kept; a step is forward, backward, clipping and fused AdamW on the "
    "projections or factors alone, all in bfloat16 but for the products in float8; loss: the mean square of the last "
    "hidden states; compiled blocks, the whole step in one CUDA graph; median of five rounds, each a median of "
    "replays. A process for each row: all compile at once, then each is timed alone, once in each round"
)
#: (in features, out features, rank) of the layers whose gradients are compared with float64
CHECKED = ((4096, 4096, 1024), (4096, 14336, 1584))


class Blocks(nn.Module):
    """The decoder of a causal language model, with a loss of its own."""

    def __init__(self, causal: Any):
        super().__init__()
        self.model, self.config = causal.model, causal.config
        self.loss_function = mean_square

    def forward(self, input_ids: Tensor, labels: Tensor, use_cache: bool) -> Any:
        hidden = self.model(input_ids=input_ids, use_cache=use_cache)
        hidden.loss = self.loss_function(hidden.last_hidden_state)
        return hidden

    def set_attn_implementation(self, name: str) -> None:
        self.model.set_attn_implementation(name)


def mean_square(hidden: Tensor) -> Tensor:
    return hidden.float().square().mean()


def blocks_for(variant: str, products: str, count: int, device: str, **sizes: Any) -> tuple[Blocks, list[str]]:
    """(the blocks, their projections)."""
    shape = SHAPES[MODEL].of_blocks(count)
    # the words are in no projection
    shape = replace(shape, build=partial(shape.build, vocab_size=1024, **sizes))
    with torch.device("meta"):
        names = find_targets(Blocks(shape.build()))
    model = Blocks(build_model(shape, Variant.parse(variant), 0.5, device, torch.bfloat16))
    if products == "torchao":
        train_by_torchao(model, names)
    elif products == "float8" and variant == "dense":
        for name in names:
            model.set_submodule(name, Float8Linear(model.get_submodule(name)))
    elif products == "float8":
        open_float8(model)
    return model, names


def error_rows(device: str, tokens: int) -> list[dict]:
    """Errors of output and gradients of low-rank layers against float64, on `device` and emulated."""
    found = []
    for k, n, rank in CHECKED:
        generator = torch.Generator(device).manual_seed(0)
        shapes = {"x": (tokens, k), "u": (n, rank), "v": (rank, k), "grad": (tokens, n)}
        made = {name: torch.randn(size, device=device, generator=generator) for name, size in shapes.items()}
        # tokens differ in size, in gradients by orders of magnitude
        made["grad"] *= torch.randn(tokens, 1, device=device, generator=generator).mul(2).exp()
        row = {"measured": "training error", "in_features": k, "out_features": n, "rank": rank, "tokens": tokens}
        exact = gradients(made, torch.float64, None)
        for impl in ("auto", "reference"):
            pairs = zip(gradients(made, torch.bfloat16, impl), exact, strict=True)
            row[impl] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
        found.append(row)
    return found


def gradients(made: dict[str, Tensor], dtype: torch.dtype, impl: str | None) -> list[Tensor]:
    """Output, dx, du and dv; without an impl, by plain products."""
    x, u, v = (made[name].to(dtype).requires_grad_() for name in ("x", "u", "v"))
    out = x @ v.T @ u.T if impl is None else linear_in_float8("low_rank", x, [u, v], impl=impl)
    return [out.detach(), *torch.autograd.grad(out, (x, u, v), made["grad"].to(dtype))]


class Job(NamedTuple):
    """One row of the file at `path`: the step `STEPS[index]`."""

    index: int
    blocks: int
    tokens: int
    device: str
    commit: str
    path: str


def row_of(
    job: Job,
    building: Semaphore,
    turn: Callable[[], AbstractContextManager[None]],
    so_far: Callable[[dict], None],
    **sizes: Any,
) -> dict:
    """The row of one step, timed within turns, at whose ends `so_far` is handed it."""
    variant, products = STEPS[job.index]
    with building:
        model, names = blocks_for(variant, products, job.blocks, job.device, **sizes)
        if job.device == "cuda":
            torch.cuda.empty_cache()
    row = named(job)
    settings = "text", names, 1, job.tokens, "compiled", "default", Timer(job.device)
    return row | training(
        model,
        *settings,
        profile=job.device == "cuda",
        rounds=ROUNDS,
        turn=turn,
        so_far=lambda found: so_far(row | found),
    )


def named(job: Job) -> dict:
    """What is known of a row before it is measured."""
    variant, products = STEPS[job.index]
    row = {"measured": "training step", "model": MODEL, "blocks": job.blocks, "variant": variant}
    return row | {
        "float8": products != "plain",
        "impl": products,
        "batch": 1,
        "tokens": job.tokens,
        "commit": job.commit,
    }


def work(job: Job, building: Semaphore, together: Barrier, alone: Lock) -> None:
    """Measure one row, which the file holds from its first round on."""
    where = environment() | {"commit": job.commit}
    head = head_of(Path(job.path), where)

    def keep(row: dict) -> None:
        row = row | {"date": where["date"]}
        file = ResultFile(Path(job.path), head, append=True)
        same = row["variant"], row["impl"]
        file.rows = [kept for kept in file.rows if (kept.get("variant"), kept.get("impl")) != same]
        file.add([row])

    # a GPU's rows have a profile too
    turns = Turns(together, alone, ROUNDS + (job.device == "cuda"))
    try:
        row = row_of(job, building, turns.turn, keep)
    except Exception as error:
        row = named(job) | {"error": in_one_line(error)}
    with alone:
        keep(row)
        print(*STEPS[job.index], row.get("ms"), row.get("ms_of_rounds"), row.get("error"), flush=True)
    turns.pass_on()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(STEPS)), help="numbers of the steps")
    parser.add_argument("--json", type=Path, default=RESULTS / "float8_h200.json")
    parser.add_argument("--commit", help="of the code measured; asked of git if left out")
    args = parser.parse_args()
    where = environment() | ({"commit": args.commit} if args.commit else {})
    file = ResultFile(args.json, head_of(args.json, where), append=True)
    file.rows = [row for row in file.rows if not row["measured"].startswith("training")]
    file.add([])
    settings = args.blocks, args.tokens, args.device, where["commit"], str(args.json)
    jobs = []
    for index in args.only:
        reason = missing("torchao") if STEPS[index][1] == "torchao" else None
        if reason:
            print(f"{' by '.join(STEPS[index])} is left out: {reason}", flush=True)
        else:
            jobs.append(Job(index, *settings))
    in_turns(work, jobs)
    if len(args.only) == len(STEPS):
        rows = [row | {"commit": where["commit"]} for row in error_rows(args.device, args.tokens)]
        ResultFile(args.json, file.head, append=True).add(rows)
        for row in rows:
            print(row)


def head_of(path: Path, where: dict) -> dict:
    """What stands above the rows: of other measurements of float8 where the file has them, which say more."""
    if not path.exists():
        return {"environment": where, "dtype": "bfloat16", "protocol": PROTOCOL}
    return {key: value for key, value in read_result(path).items() if key != "rows"}


if __name__ == "__main__":
    main()
