"""Which layers, sizes, numbers of tokens and implementations `bench layers` goes through."""

from __future__ import annotations

from dataclasses import dataclass

from hf_blr.bench.shapes import LAYERS, Layer, aligned_spec
from hf_blr.structures import Blast, BLRSpec, Monarch

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


def paper_cases(models, tokens, directions) -> list[Case]:
    """The paper's layers; training at 4096 tokens on the Llamas only."""
    cases = []
    for model in models:
        for layer in LAYERS[model]:
            specs = tuple(paper_and_other_blocks(layer, small="Llama" not in model))
            if FORWARD in directions:
                cases += [Case(model, layer, specs, t, FORWARD) for t in tokens]
            if TRAINING in directions and "Llama" in model:
                cases += [Case(model, layer, specs, 4096, TRAINING)]
    return cases


def paper_and_other_blocks(layer: Layer, small: bool) -> list[BLRSpec]:
    """The paper's blocks, and fewer or unequal ones, at the paper's rank; pivoted at low-rank's parameters."""
    k, n = layer.in_features, layer.out_features
    specs = [layer.paper_spec("low_rank")]
    specs.append(aligned_spec("pivoted", k, n, specs[0].ratio))
    if layer.monarch:
        total, blocks = layer.monarch
        specs += [Monarch(k, n, total // b, (b, b)) for b in sorted({blocks, 4})]
    b = layer.blast_blocks
    blocks = {(b, b), (4, 4)} if small else {(b, b), (4, 4), (2, 16), (4, 16), (4, 32)}
    return specs + [Blast(k, n, layer.rank, pair) for pair in sorted(blocks) if k % pair[0] == 0 and n % pair[1] == 0]


def shape_cases(shapes, blocks, ratio, tokens, directions) -> list[Case]:
    """Layers of the user's own sizes [(K, N)], at this budget and these (B1, B2)."""
    cases = []
    for k, n in shapes:
        specs = [aligned_spec(structure, k, n, ratio) for structure in ("low_rank", "pivoted")]
        specs += [aligned_spec(structure, k, n, ratio, pair) for structure in ("monarch", "blast") for pair in blocks]
        layer = Layer(f"{k}x{n}", k, n, specs[0].rank, None, 1, "")
        cases += [Case("", layer, tuple(specs), t, d) for d in directions for t in tokens]
    return cases


def wanted_impls(case: Case, spec: BLRSpec, impls) -> list[str]:
    """Ours always; PyTorch's forms where they are of interest: low-rank's eager one is a baseline everywhere."""
    paper = spec.structure == "low_rank" or spec.num_blocks == (case.layer.blast_blocks,) * 2 or not case.model
    wanted = ["hf_blr"]
    if spec.structure == "low_rank" or (paper and case.tokens in PYTORCH_TOKENS):
        wanted.append("eager")
    if paper and case.tokens in PYTORCH_TOKENS and case.direction == FORWARD:
        wanted.append("compiled")
    return [impl for impl in wanted if impl in impls]
