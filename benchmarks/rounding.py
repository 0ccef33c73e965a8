"""What the steps of rounding give a real model: nearest codes, GPTQ, the refit of u, the rotation of the rank.

    python benchmarks/rounding.py --model FOLDER --gguf-file NAME --fit wikitext2-valid=valid.txt \
        --texts wikitext2=test.txt ptb=ptb.txt --json results/rounding.json

Weights of a 4-bit file lie on a grid of their own, which no code of ours should profit from: the input side of every
layer is rotated by a random orthogonal matrix before anything is fitted, and back before scoring.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from protocol import read_ids

from hf_blr import BLRConfig, collect_statistics
from hf_blr.bench.environment import environment
from hf_blr.bench.report.files import ResultFile
from hf_blr.calibration.fisher import Statistics
from hf_blr.cli import loading, options
from hf_blr.factorize import factorize
from hf_blr.factorize import nearest as rounded_to_nearest
from hf_blr.factorize.bits import ToRound, refitted, rotation
from hf_blr.factorize.gram import damped
from hf_blr.formats import PLAIN, Codes
from hf_blr.ops.table import implementation_of
from hf_blr.plan import resolve_plan
from hf_blr.structures import BLRSpec, structure_named

FIT_SEQLEN, FIT_WINDOWS = 512, 8
SEQLEN, WINDOWS = 512, 4
RATIO = 0.8
PROTOCOL = (
    f"perplexity, and KL divergence of the dense model's next token from the rounded one's in nats, on the first "
    f"{WINDOWS} windows of {SEQLEN} of each text, no BOS; float32; fitted to {FIT_WINDOWS} windows of {FIT_SEQLEN} "
    "spread over one text, on the dense model's inputs and without weights of outputs; a random rotation of each "
    "layer's inputs before fits"
)

#: (fitted tensors, what is to be rounded) -> the tensors as they are stored
Way = Callable[[BLRSpec, dict[str, Tensor], ToRound], dict[str, Tensor | Codes]]


def whole_fit(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    """As the package rounds the structure."""
    return structure_named(spec.structure).load("rounding")(spec, dict(tensors), problem)


def gptq(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    if "w" in tensors:
        return whole_fit(spec, tensors, problem)
    u, v = tensors["u"], tensors["v"]
    return {"u": problem.round(u, v @ problem.input_gram @ v.T), "v": problem.round(v, problem.gram)}


def with_refit(spec: BLRSpec, tensors: dict[str, Tensor], problem: ToRound) -> dict[str, Tensor | Codes]:
    v = problem.round(tensors["v"], problem.gram)
    u, gram = refitted(problem.weight, v.numbers(torch.float32), problem.input_gram)
    return {"u": problem.round(u, gram), "v": v}


WAYS: dict[str, Way] = {
    "nearest": rounded_to_nearest,
    "GPTQ": gptq,
    "GPTQ, refit": with_refit,
    "GPTQ, refit, rotation": whole_fit,
}
#: (structure, format, way); no way: the fit without rounding
ROWS = [
    ("dense", "int4", "nearest"),
    ("dense", "int4", "GPTQ"),
    ("low_rank", "int4", ""),
    *(("low_rank", "int4", way) for way in WAYS),
    ("dense", "int3", "nearest"),
    ("dense", "int3", "GPTQ"),
]


def config_of(structure: str, storage: str, group: int, blocks: range) -> BLRConfig:
    chosen = "|".join(map(str, blocks))
    common = {"group_size": group, "fisher": False, "target_modules": rf".*layers\.({chosen})\..*proj"}
    if structure == "dense":
        return BLRConfig("dense", dense_format=storage, **common)
    return BLRConfig(structure, ratio=RATIO, factor_format=storage, **common)


class Layers:
    """The layers of a dense model with rotated inputs, and the fit of each structure to them, which all ways share."""

    def __init__(self, dense: nn.Module, statistics: Statistics):
        self.dense, self.statistics = dense, statistics
        self.turns: dict[int, Tensor] = {}
        self.fits: dict[tuple[str, BLRSpec], dict[str, Tensor]] = {}

    def model(self, config: BLRConfig, way: Way | None) -> tuple[nn.Module, float]:
        """A copy with the matrix of every layer in its place, and the bits that are stored for each of its numbers.

        way: None leaves the factors as they are fitted.
        """
        model, stored_bits, numbers = copy.deepcopy(self.dense), 0, 0
        for name, layer in resolve_plan(self.dense, config).items():
            spec, storage = layer.spec, layer.storage if way is not None else PLAIN
            weight = model.get_submodule(name).weight.data
            k = spec.in_features
            turn = self.turns.setdefault(k, rotation(k, k, weight))
            turned, gram = weight @ turn, turn.T @ self.statistics.grams[name] @ turn
            fit_options = config.fit_options(k, self.statistics.rows_of(name))
            if (name, spec) not in self.fits:
                self.fits[name, spec] = factorize(turned, spec, gram, options=fit_options).tensors
            tensors = self.fits[name, spec]
            if way is not None:
                problem = ToRound(turned, damped(gram, fit_options.damping), None, None, layer.storage, config.seed)
                tensors = {key: numbers_of(t) for key, t in way(spec, tensors, problem).items()}
            weight.copy_(implementation_of(spec.structure).dense(**tensors) @ turn.T)
            stored_bits += 8 * storage.num_bytes(spec, torch.bfloat16)
            numbers += spec.dense_parameters
        return model, stored_bits / numbers


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    """Of every next token, `[WINDOWS, SEQLEN, vocabulary]`."""
    rows = ids[: WINDOWS * SEQLEN].view(WINDOWS, SEQLEN)
    return torch.stack([model(input_ids=row[None]).logits[0].log_softmax(-1) for row in rows])


def perplexity_of(found: Tensor, ids: Tensor) -> float:
    rows = ids[: WINDOWS * SEQLEN].view(WINDOWS, SEQLEN)
    return found[:, :-1].gather(-1, rows[:, 1:, None]).double().mean().neg().exp().item()


def divergence(right: Tensor, found: Tensor) -> float:
    return (right.exp() * (right - found)).sum(-1).double().mean().item()


def numbers_of(tensor: Tensor | Codes) -> Tensor:
    return tensor.numbers(torch.float32) if isinstance(tensor, Codes) else tensor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    options.add_loading(parser, dtype="float32")
    parser.add_argument("--fit", required=True, metavar="NAME=FILE", help="text to fit to, or a torch file of its ids")
    parser.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE", help="texts to score, likewise")
    parser.add_argument("--every", type=int, default=1, help="one block of so many: a processor's time is short")
    parser.add_argument("--group", type=int, default=32, help="numbers that share a scale")
    parser.add_argument("--commit", help="of the source, where there is no checkout")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(argv)
    dense, tokenizer = loading.load_model(args.model, args, reader=any("=" in s for s in (args.fit, *args.texts)))
    texts = {name: text.to(args.device) for name, text in read_ids(args.texts, tokenizer).items()}
    ((fitted_to, ids),) = read_ids([args.fit], tokenizer).items()
    starts = torch.linspace(0, len(ids) - FIT_SEQLEN, FIT_WINDOWS).long().tolist()
    batches = [ids[None, start : start + FIT_SEQLEN].to(args.device) for start in starts]
    blocks = range(0, dense.config.num_hidden_layers, args.every)
    statistics = collect_statistics(dense, config_of("dense", "int4", args.group, blocks), calibration=batches)
    right = {name: log_probabilities(dense, text) for name, text in texts.items()}
    layers = Layers(dense, statistics)
    machine = environment()
    head = {
        "protocol": PROTOCOL,
        "blocks": f"{len(blocks)} of {dense.config.num_hidden_layers}",
        "group": args.group,
        "ratio": RATIO,
        "fitted_to": fitted_to,
        "environment": {**machine, "commit": args.commit or machine["commit"]},
    }
    file = ResultFile(args.json, head)

    def score(model: nn.Module, **facts: Any) -> None:
        found = {name: log_probabilities(model, text) for name, text in texts.items()}
        scores = {
            "ppl": {name: perplexity_of(found[name], text) for name, text in texts.items()},
            "kl": {name: divergence(right[name], found[name]) for name in texts},
        }
        file.add([{"model": Path(args.gguf_file or args.model).name.partition(".Q")[0], **facts, **scores}])
        print(file.rows[-1], flush=True)

    score(dense, structure="dense", format="plain", way="", bits=16.0, seconds=0.0)
    for structure, storage, way in ROWS:
        started = time.perf_counter()
        model, bits = layers.model(config_of(structure, storage, args.group, blocks), WAYS.get(way))
        seconds = time.perf_counter() - started
        score(model, structure=structure, format=storage if way else "plain", way=way, bits=bits, seconds=seconds)


if __name__ == "__main__":
    main()
