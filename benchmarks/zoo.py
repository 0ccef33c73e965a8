"""Every architecture of the zoo through `compress`, with its own kind of data: `python benchmarks/zoo.py`.

Small random models, a minute or two on one core. Says of each how many of its layers the data reached and how many were
fitted to the model compressed so far, whether the statistics of padded batches are those of plain forwards over the
samples, and how far the compressed model's outputs are from the dense one's on samples that nothing was fitted to.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conditions import RESULTS
from torch import nn
from zoo_inputs import Sample, padded_batches, plain_grams, samples
from zoo_models import KINDS, LEFT_OUT, build, linear_targets, reads_positions

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.bench.environment import environment
from hf_blr.calibration.blockwise import whole_model_grams
from hf_blr.calibration.losses import predicted
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.modes import evaluating

RATIO = 0.5
#: samples fitted to, in batches of different sizes, the last one smaller; and samples scored
SIZES, SCORED = (16, 12, 16, 12, 8), 12
#: so much longer than in the tests, or so many more where images of four patches fix the length: regressions want many
#: times as many rows as a layer has inputs
LONGER, MORE = 4, 12
#: statistics count as those of plain forwards up to this relative error: float32 rounds by less
EQUAL = 1e-5


def row(name: str) -> dict:
    """One architecture."""
    started = time.perf_counter()
    dense = build(name)
    longer, more = (1, MORE) if "images" in KINDS[name] else (LONGER, 1)
    sizes = tuple(more * size for size in SIZES)
    parts = samples(name, sum(sizes) + SCORED, longer)
    fitted, scored = parts[: sum(sizes)], parts[sum(sizes) :]
    batches, names = padded_batches(name, fitted, sizes), linear_targets(dense)
    right = plain_grams(dense, names, fitted)
    with evaluating(dense):
        found = whole_model_grams(dense, names, batches)
        chain = SequentialChain.trace(dense, names, batches)
    statistics = collect_statistics(dense, BLRConfig("low_rank", ratio=RATIO), calibration=batches)
    wrong = max(
        ((found[key].double() - gram).norm() / gram.norm()).item()
        for key, gram in right.items()
        if not reads_positions(name, key)
    )
    chained = {layer for segment in chain.segments for layers in segment.groups.values() for layer in layers}
    measured = {
        "kind": KINDS[name],
        "model": name,
        "layers": len(names),
        "reached": len(right),
        "sequential": len(chained & set(right)),
        "chains": len(chain.segments),
        "gram_error": wrong,
        "equal": set(found) == set(right) == set(names) - statistics.unreached and wrong < EQUAL,
    }
    for sequential in (True, False):
        model = copy.deepcopy(dense)
        config = BLRConfig("low_rank", ratio=RATIO, sequential=sequential)
        compress(model, config, calibration=batches, statistics=statistics, progress=False)
        measured["error_sequential" if sequential else "error_one_shot"] = output_error(dense, model, scored)
    return measured | {"seconds": time.perf_counter() - started}


@torch.no_grad()
def output_error(dense: nn.Module, model: nn.Module, parts: list[Sample]) -> float:
    """Relative squared error of what the model puts out."""
    error = size = 0.0
    for part in parts:
        for key, value in predicted(dense, dense(**part)).items():
            error += (predicted(model, model(**part))[key] - value).square().sum().item()
            size += value.square().sum().item()
    return error / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(KINDS), help="architectures; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for name in args.names:
        if name in LEFT_OUT:
            rows.append({"kind": KINDS[name], "model": name, "left_out": LEFT_OUT[name]})
        else:
            rows.append(row(name))
        print(rows[-1], flush=True)
    args.out.write_text(json.dumps({"ratio": RATIO, "rows": rows, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
