"""Long runs on tiny models, and what went wrong in them: `python benchmarks/endurance.py --only forwards rounds`.

Wrong is what has other bits than the first time, or than a run that nothing stopped; after a full disk also an error
that is no line saying so, and an old model that is not there any more. Memory is what the process holds at the end,
less what it held after a tenth of the run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import psutil
import torch
from conditions import RESULTS
from interrupted import full_disks, kills
from robustness import quiet
from tiny import tiny_llama
from torch import Tensor
from transformers import LlamaForCausalLM

from hf_blr import BLRConfig, compress, fuse
from hf_blr.bench.environment import environment
from hf_blr.structures import structures

#: of the tokens of a forward; kernels and plans depend on it
LENGTHS = (1, 2, 7, 33, 100)
THREADS = 2


def models() -> list[LlamaForCausalLM]:
    """One of each structure, one in each way of storing numbers, and one that is fused."""
    settings = [{"structure": name} for name in structures()]
    settings += [{"structure": "low_rank", "factor_format": name} for name in ("fp8", "int8", "int4")]
    made = [compressed(**each) for each in [*settings, {"structure": "low_rank"}]]
    fuse(made[-1])
    return made


def compressed(**settings: object) -> LlamaForCausalLM:
    model = tiny_llama()
    compress(model, BLRConfig(ratio=0.6, fit_rounds=2, **settings), progress=False)
    return model


@torch.no_grad()
def logits(model: LlamaForCausalLM, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return model(torch.randint(0, 257, (1, length), generator=generator)).logits


def forwards(times: int, folder: Path) -> dict:
    made = models()
    wanted = [[logits(model, length) for length in LENGTHS] for model in made]

    def one(i: int) -> bool:
        which, length = i % len(made), i // len(made) % len(LENGTHS)
        return torch.equal(logits(made[which], LENGTHS[length]), wanted[which][length])

    return repeated(one, times)


def rounds(times: int, folder: Path) -> dict:
    """Saved, and loaded from there, again and again; fused layers are saved one by one."""
    made = models()[:-1]
    wanted = [model.state_dict() for model in made]

    def one(i: int) -> bool:
        which = i % len(made)
        made[which].save_pretrained(folder / "round")
        made[which] = LlamaForCausalLM.from_pretrained(folder / "round")
        return same(made[which].state_dict(), wanted[which])

    return repeated(one, times)


def threads(times: int, folder: Path) -> dict:
    """Each runs a compressed model of its own so many times, saves it and loads it."""
    found: dict[int, dict] = {}
    # one after the other: their weights are drawn by one generator, which all threads share
    made = [compressed(structure=name) for name in ("low_rank", "monarch")[:THREADS]]

    def work(which: int, results: dict[int, dict]) -> None:
        outputs = [logits(made[which], LENGTHS[i % len(LENGTHS)]) for i in range(times)]
        made[which].save_pretrained(folder / f"thread-{which}")
        loaded = LlamaForCausalLM.from_pretrained(folder / f"thread-{which}")
        results[which] = loaded.state_dict() | {f"outputs.{i}": output for i, output in enumerate(outputs)}

    alone: dict[int, dict] = {}
    for which in range(THREADS):
        work(which, alone)
    together = [threading.Thread(target=work, args=(which, found)) for which in range(THREADS)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    wrong = sum(not same(found.get(which, {}), numbers) for which, numbers in alone.items())
    return {"tried": THREADS * times, "wrong": wrong}


def repeated(one: Callable[[int], bool], times: int) -> dict:
    """Counts what `one` says is wrong, and what the process holds more after the first tenth."""
    process, wrong, before = psutil.Process(), 0, 0
    for i in range(times):
        if i == times // 10:
            before = process.memory_info().rss
        wrong += not one(i)
    return {"tried": times, "wrong": wrong, "grew_bytes": process.memory_info().rss - before}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


#: {name: (what it is called in the table, how, how many times)}
RUNS: dict[str, tuple[str, Callable[[int, Path], dict], int]] = {
    "kills": ("kills at random moments, each gone on with", kills, 30),
    "full disks": ("full disks: of the model, the journal, the statistics", full_disks, 3),
    "forwards": ("forwards", forwards, 10_000),
    "rounds": ("saved and loaded", rounds, 300),
    "threads": ("forwards in two threads, with a save and a load in each", threads, 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=RESULTS / "endurance.json")
    args = parser.parse_args()
    quiet()
    rows = []
    for name in args.only:
        title, run, times = RUNS[name]
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"what": title, **run(times, Path(folder)), "seconds": time.perf_counter() - started})
        print(rows[-1], flush=True)
    args.out.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
