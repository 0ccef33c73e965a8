"""How damaged checkpoints and configs are refused: `python benchmarks/robustness.py --cases 400`.

Each case damages a whole checkpoint of a tiny model in one way and loads it. A refusal is clear if it is one of the
errors that the command line prints as one line and names the tensor, module, file or field that is damaged. A minute.
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
from damage import KINDS, OF_INDICES, Checkpoint, damaged, whole
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from hf_blr.bench.environment import environment
from hf_blr.structures import structures

CLEAR, OBSCURE, ACCEPTED = "refused clearly", "obscure", "accepted wrongly"
#: what the command line takes for a user's mistake
USER_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError, OSError)


def structure_for(kind: str, rng: Random) -> str:
    """A structure that this kind of damage can meet."""
    return "pivoted" if kind in OF_INDICES else rng.choice(sorted(structures()))


def outcome(checkpoint: Checkpoint, kind: str, rng: Random) -> tuple[str, str]:
    """(what became of a damaged copy, the message or ""); it is loaded from files."""
    new, names = damaged(checkpoint, kind, rng)
    with tempfile.TemporaryDirectory() as folder:
        new.write(Path(folder))
        try:
            LlamaForCausalLM.from_pretrained(folder)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            clear = isinstance(error, USER_ERRORS) and any(name in str(error) for name in names)
            return CLEAR if clear else OBSCURE, message
    return ACCEPTED, f"damaged: {', '.join(names)}"


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
    wholes = {name: whole(name) for name in structures()}
    counts = {kind: Counter() for kind in KINDS}
    for case in range(args.cases):
        kind = list(KINDS)[case % len(KINDS)]
        result, message = outcome(wholes[structure_for(kind, rng)], kind, rng)
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
