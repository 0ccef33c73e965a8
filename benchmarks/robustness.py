"""How damaged checkpoints and wrong inputs are refused: `python benchmarks/robustness.py --cases 400`.

Each case damages a whole checkpoint of a tiny model in one way and loads it, or compresses one with something wrong. A
refusal is clear if it is one of the errors that the command line prints as one line and names the tensor, module, file,
field or argument. A minute.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from conditions import RESULTS
from damage import KINDS, OF_INDICES, SIZES, Checkpoint, damaged, whole
from damage_bits import FORMATS, KINDS_OF_BITS, formats_for
from damage_files import KINDS_OF_FILES
from damage_inputs import INPUTS, called
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from hf_blr.bench.environment import environment
from hf_blr.linear import blr_modules
from hf_blr.structures import structures

CLEAR, OBSCURE, ACCEPTED = "refused clearly", "obscure", "accepted wrongly"
ALL_KINDS = (*KINDS, *KINDS_OF_BITS, *KINDS_OF_FILES, *INPUTS)
#: what the command line takes for a user's mistake
USER_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError, OSError)


def wholes(sizes: dict[str, int] = SIZES) -> dict[str, Checkpoint]:
    """{structure, or format: an undamaged checkpoint}."""
    in_bits = {name: whole("low_rank", sizes, factor_format=name) for name in FORMATS}
    return {name: whole(name, sizes) for name in structures()} | in_bits


def outcome(checkpoints: dict[str, Checkpoint], kind: str, rng: Random) -> tuple[str, str]:
    """(what became of a damaged copy that was loaded from files, or of a wrong input; the message or "").

    Args:
        checkpoints: from `wholes`.
    """
    if kind in INPUTS:
        return outcome_of_input(kind, rng)
    new, names = damaged_one(checkpoints, kind, rng)
    with tempfile.TemporaryDirectory() as folder:
        new.write(Path(folder))
        return outcome_of_load(Path(folder), names)


def damaged_one(checkpoints: dict[str, Checkpoint], kind: str, rng: Random) -> tuple[Checkpoint, list[str]]:
    """One of the checkpoints that can have this kind of damage, with it, and names of which a clear refusal has one."""
    if kind in KINDS_OF_BITS:
        return damaged(checkpoints[rng.choice(formats_for(kind))], KINDS_OF_BITS[kind], rng)
    if kind in KINDS_OF_FILES:
        return damaged(checkpoints[rng.choice(sorted(checkpoints))], KINDS_OF_FILES[kind], rng)
    choice = ["pivoted"] if kind in OF_INDICES else sorted(structures())
    return damaged(checkpoints[rng.choice(choice)], KINDS[kind], rng)


def outcome_of_load(folder: Path, names: list[str]) -> tuple[str, str]:
    try:
        LlamaForCausalLM.from_pretrained(folder)
    except Exception as error:
        return judged(error, names)
    return ACCEPTED, f"damaged: {', '.join(names)}"


def outcome_of_input(kind: str, rng: Random) -> tuple[str, str]:
    """Of a compression; one that is refused after it has replaced a layer counts as accepted."""
    model, call, names = called(kind, rng)
    try:
        call()
    except Exception as error:
        if not blr_modules(model):
            return judged(error, names)
    return ACCEPTED, f"wrong: {', '.join(names)}"


def judged(error: Exception, names: list[str]) -> tuple[str, str]:
    """Whether a refusal is clear."""
    clear = isinstance(error, USER_ERRORS) and any(name in str(error) for name in names)
    return CLEAR if clear else OBSCURE, f"{type(error).__name__}: {error}"


def quiet() -> None:
    """Without the loader's bars and its reports of what was wrong, which come beside the errors."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_blr").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "robustness.json")
    args = parser.parse_args()
    quiet()
    started, rng = time.perf_counter(), Random(args.seed)
    checkpoints = wholes()
    counts = {kind: Counter() for kind in ALL_KINDS}
    for case in range(args.cases):
        kind = ALL_KINDS[case % len(ALL_KINDS)]
        result, message = outcome(checkpoints, kind, rng)
        counts[kind][result] += 1
        if result != CLEAR:
            print(f"{kind}: {result}: {message[:300]}", flush=True)
    rows = [
        {"kind": kind, "tried": sum(count.values()), **{name: count[name] for name in (CLEAR, OBSCURE, ACCEPTED)}}
        for kind, count in counts.items()
    ]
    result = {"seed": args.seed, "seconds": time.perf_counter() - started, "rows": rows, "environment": environment()}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
