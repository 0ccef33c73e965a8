"""Which layers, sizes, numbers of tokens and implementations `bench layers` goes through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_blr.bench.shapes import BASELINE, LAYERS, Layer, aligned_spec
from hf_blr.structures import BLRSpec, make_spec, structure_named

TOKENS = (1, 16, 128, 1024, 4096)
FORWARD, TRAINING = "forward", "forward+backward"
#: hf_blr: the package's ops; eager: plain PyTorch; compiled: plain PyTorch under torch.compile
IMPLS = ("hf_blr", "eager", "compiled")
#: tokens at which eager and compiled PyTorch are timed too; low-rank's eager form is timed at all
PYTORCH_TOKENS = (1, 1024)


@dataclass(frozen=True)
class Case:
    """One layer at one number of tokens: all of its rows are measured together."""

    model: str
    layer: Layer
    specs: tuple[BLRSpec, ...]
    tokens: int
    direction: str


def paper_cases(models: Sequence[str], tokens: Sequence[int], directions: Sequence[str]) -> list[Case]:
    """The paper's layers; training at 4096 tokens on the Llamas only."""
    cases = []
    for model in models:
        for layer in LAYERS[model]:
            specs = tuple(layer.specs(small="Llama" not in model))
            if FORWARD in directions:
                cases += [Case(model, layer, specs, t, FORWARD) for t in tokens]
            if TRAINING in directions and "Llama" in model:
                cases += [Case(model, layer, specs, 4096, TRAINING)]
    return cases


def shape_cases(
    shapes: Sequence[tuple[int, int]],
    blocks: Sequence[tuple[int, int]],
    ratio: float,
    tokens: Sequence[int],
    directions: Sequence[str],
    names: Sequence[str],
    multiple: int | None = None,
) -> list[Case]:
    """Layers of the user's own sizes [(K, N)], at this budget and these (B1, B2), in the structures of these names.

    multiple: of ranks, where that costs little; see `align_rank`.
    """
    cases = []
    for k, n in shapes:
        specs = [
            aligned_spec(name, k, n, ratio, pair, multiple)
            for name in names
            for pair in (blocks if structure_named(name).spec.blocked else [None])
        ]
        rank = make_spec(BASELINE, k, n, ratio=ratio).rank
        layer = Layer(f"{k}x{n}", k, n, rank, None, 1, "")
        cases += [Case("", layer, tuple(specs), t, d) for d in directions for t in tokens]
    return cases


def wanted_impls(case: Case, spec: BLRSpec, impls: Sequence[str]) -> list[str]:
    """Ours always; PyTorch's forms where they are of interest: the baseline's eager one everywhere."""
    baseline = spec.structure == BASELINE
    paper = baseline or spec.num_blocks == (case.layer.blast_blocks,) * 2 or not case.model
    wanted = ["hf_blr"]
    if baseline or (paper and case.tokens in PYTORCH_TOKENS):
        wanted.append("eager")
    if paper and case.tokens in PYTORCH_TOKENS and case.direction == FORWARD:
        wanted.append("compiled")
    return [impl for impl in wanted if impl in impls]
