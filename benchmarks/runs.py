"""What the quality benchmark runs: one entry for each method, structure and size."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from hf_blr import BLRConfig
from hf_blr.formats import PLAIN

OURS = "ours"
REFINED = "ours, refined"
BLOCK_JOINT = "ours, block-joint"
BLOCK_JOINT_REFINED = "ours, block-joint, refined"
TWICE_FITTED, TWICE_FITTED_JOINT = "ours, two passes", "ours, two passes, block-joint"
#: the dense model trained like ours: the fair row beside every refined one. Which learning rate suits it, as a share of
#: the factors', is not known beforehand
DENSE_REFINED, DENSE_RATES = "dense, refined", (0.1, 0.03, 1.0)
#: learning rates of refinements: what is nearly whole takes smaller steps
RATE, RATES = 3e-4, {0.8: 2e-4, 0.9: 1e-4}
OFF = {"sequential": False, "fisher": False, "allocation": "uniform"}
ACTIVATIONS = "activations"
RATIOS = (0.5, 0.8, 0.3, 0.9, 0.6, 0.7, 0.4)
#: what each switch gives, beside everything off and everything on
LADDER = {
    ACTIVATIONS: OFF,
    "+ Fisher": {**OFF, "fisher": True},
    "+ Fisher + shared budget": {"sequential": False},
    "+ sequential": {**OFF, "sequential": True},
}
#: gradient steps on each block by itself
BLOCK_STEPS = 64
#: the whole model fitted twice; and more steps on each block with it
TWICE, TWICE_JOINT = {"passes": 2}, {"passes": 2, "block_steps": 128}
#: more of these steps, in runs of their own
MORE_STEPS = (256, 512)
#: what all fits had before damping followed the number of tokens
SMALL_DAMPING = {"damping": 1e-4}
#: twice the rounds of alternating least squares, and a later stop
MORE_ROUNDS = {"fit_rounds": 32, "fit_tolerance": 1e-3}
#: temperatures of MoDeGPT's allocation: its own, and nearly the same share for all blocks
EPSILONS = (0.1, 1.0)
#: of AA-SVD over the text for each block; its authors make 25
AA_PASSES = 5
#: the format of a run that chooses one for each layer
CHOSEN = "chosen"
#: kinds of runs that read no text
TEXTLESS = ("weights", "descent", "torchao")
#: kinds of runs that train
TRAINED = ("refine", "refine dense", "refine around")


@dataclass(frozen=True)
class Run:
    """One method at one ratio; `kind` says how its model is made."""

    method: str
    structure: str | None
    ratio: float
    blocks: tuple[int, int] | None = None
    kind: str = "compress"
    settings: tuple = ()
    #: what trains of layers in bits, of a run that refines
    trains: str = "scales"

    @property
    def label(self) -> str:
        structure = "" if self.structure is None else f"{self.structure} "
        blocks = "" if self.blocks is None else "{}x{} ".format(*self.blocks)
        size = f"{self.ratio:g}" if self.budget is None else f"{self.budget:g} bits"
        stored = "" if self.format in (PLAIN.name, CHOSEN) else f" in {self.format}"
        return f"{structure}{blocks}{size} {self.method}{stored}"

    @property
    def rate(self) -> float:
        """The learning rate of a refinement."""
        return RATES.get(self.ratio, RATE)

    @property
    def budget(self) -> float | None:
        """Bits a weight, where they are shared out; `ratio` is one then."""
        return dict(self.settings).get("bits_per_weight")

    @property
    def format(self) -> str:
        """What factors are stored in, and the targets that stay whole."""
        return CHOSEN if self.budget is not None else dict(self.settings).get("dense_format", PLAIN.name)

    def config(self, seed: int = 0) -> BLRConfig:
        sized = self.structure == "dense" or self.budget is not None
        ratio = None if sized else self.ratio
        # a baseline's settings are its own
        settings = {} if self.kind == "aa_svd" else dict(self.settings)
        return BLRConfig(self.structure, ratio=ratio, num_blocks=self.blocks, seed=seed, **settings)

    @property
    def family(self) -> tuple:
        """A run that refines can go on from a fit of its family."""
        fitted = self.kind in ("compress", "refine")
        return self.structure, self.blocks, self.ratio, self.settings, fitted

    def facts(self) -> dict:
        """What its rows say of it."""
        return {
            "method": self.method,
            "structure": self.structure,
            "blocks": None if self.blocks is None else list(self.blocks),
            "ratio": self.ratio,
            "format": self.format,
            "group_size": dict(self.settings).get("group_size"),
            "bits_per_weight": self.budget,
        }


def runs() -> list[Run]:
    """All of them, the most telling first; what refines a fit comes right after it."""

    def ours(structure, ratio, blocks=None, method=OURS, settings=None):
        return Run(method, structure, ratio, blocks, settings=tuple((settings or {}).items()))

    blast = [ours("blast", ratio, (4, 16)) for ratio in (0.8, 0.5)]
    refined = [Run(REFINED, run.structure, run.ratio, run.blocks, "refine") for run in blast]
    dense = [
        Run(f"{DENSE_REFINED} at {rate:g}", None, 1.0, kind="refine dense", settings=(("dense_rate", rate),))
        for rate in DENSE_RATES
    ]
    whitened = [ours("low_rank", ratio, method="whitened SVD", settings=OFF) for ratio in (0.8, 0.5)]
    low_rank = [ours("low_rank", ratio) for ratio in (0.8, 0.5)]
    pivoted = [ours("pivoted", ratio) for ratio in (0.8, 0.5, 0.9)]
    by_block = {"block_steps": BLOCK_STEPS}
    joint = [
        ours(structure, ratio, blocks, BLOCK_JOINT, by_block)
        for structure, blocks in (("blast", (4, 16)), ("low_rank", None), ("blast", (16, 16)), ("pivoted", None))
        for ratio in (0.8, 0.5)
    ]
    joint += [
        Run(BLOCK_JOINT_REFINED, "blast", ratio, (16, 16), "refine", tuple(by_block.items())) for ratio in (0.8, 0.5)
    ]
    again = []
    more_steps = [(f"{TWICE_FITTED_JOINT}, {n} steps", {**TWICE_JOINT, "block_steps": n}) for n in MORE_STEPS]
    for ratio in (0.8, 0.5, 0.9):
        for method, settings in ((TWICE_FITTED, TWICE), (TWICE_FITTED_JOINT, TWICE_JOINT), *more_steps):
            run = ours("pivoted", ratio, None, method, settings)
            again += [run, replace(run, method=f"{method}, refined", kind="refine")]
    damping = [ours("pivoted", ratio, None, "ours, damping 0.0001", SMALL_DAMPING) for ratio in (0.8, 0.5)]
    ladder = [
        ours(structure, ratio, blocks, method, settings)
        for structure, blocks in (("low_rank", None), ("blast", (4, 16)))
        for ratio in (0.5, 0.8)
        for method, settings in LADDER.items()
        if (structure, method) != ("low_rank", ACTIVATIONS)
    ]
    sweep = [
        ours(structure, ratio, blocks)
        for ratio in (0.3, 0.9, 0.6, 0.7, 0.4)
        for structure, blocks in (("low_rank", None), ("pivoted", None), ("blast", (4, 16)))
    ]
    # low-rank and square BLAST at every ratio and stage
    stages = [
        run
        for ratio in RATIOS
        for structure, blocks in (("low_rank", None), ("blast", (16, 16)))
        for run in (
            ours(structure, ratio, blocks, ACTIVATIONS if blocks else "whitened SVD", OFF),
            ours(structure, ratio, blocks),
            Run(REFINED, structure, ratio, blocks, "refine"),
        )
    ]
    shapes = [
        ours(structure, ratio, blocks)
        for structure, blocks in (
            ("auto", None),
            ("monarch", (4, 4)),
            ("blast", (4, 4)),
            ("blast", (4, 32)),
            ("blast", (16, 4)),
            ("blast", (32, 32)),
        )
        for ratio in (0.5, 0.8)
    ]
    rounds = [ours("blast", ratio, (16, 16), "ours, 32 rounds", MORE_ROUNDS) for ratio in (0.5, 0.8)]
    others = [
        run
        for ratio in (0.8, 0.5)
        for run in (
            Run("plain SVD", "low_rank", ratio, kind="weights"),
            Run("SVD-LLM with update", "low_rank", ratio, kind="svd_llm"),
            Run(f"AA-SVD, {AA_PASSES} passes", "low_rank", ratio, kind="aa_svd", settings=(("passes", AA_PASSES),)),
            *(Run(f"MoDeGPT at {e:g}", None, ratio, kind="modegpt", settings=(("epsilon", e),)) for e in EPSILONS),
            Run("blockwise SVD, no activations", "monarch", ratio, (4, 4), kind="weights"),
            Run("BLAST's own descent", "blast", ratio, (16, 16), kind="descent"),
        )
    ]
    interleaved = [run for pair in zip(blast, refined, strict=True) for run in pair]
    storage = [run for first in pivoted for run in (first, Run(REFINED, first.structure, first.ratio, kind="refine"))]
    every = [
        *dense[:1],
        *whitened,
        *interleaved,
        *low_rank,
        *storage,
        *dense[1:],
        *again,
        *damping,
        *joint,
        *ladder[:6],
        *others[:5],
        *shapes[:2],
        *sweep,
        *stages,
        *ladder[6:],
        *shapes[2:],
        *others[5:],
        *rounds,
    ]
    after = {run.family: run for run in every if run.kind == "refine"}
    ordered = []
    for run in dict.fromkeys(every):
        if run.kind != "refine":
            ordered += [run, after[run.family]] if run.family in after else [run]
    return ordered


def shard(chosen: list[Run], part: tuple[int, int]) -> list[Run]:
    """Part i of n, from 1 on, by whole families."""
    i, n = part
    families = list(dict.fromkeys(run.family for run in chosen))
    mine = set(families[i - 1 :: n])
    return [run for run in chosen if run.family in mine]


def shard_of(text: str) -> tuple[int, int]:
    """`2/4`."""
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"expected i/n with i from 1 to n, such as 2/4, got {text!r}")
    return int(i), int(n)


#: what a row measures beside its method: rows that agree in all of it are one measurement, made twice
MEASURED_ON = (
    "model",
    "ratio",
    "dataset",
    "calibration",
    "calibration_tokens",
    "seed",
    "group_size",
    "bits_per_weight",
)


def row_key(row: dict) -> tuple:
    """What a row measures; one that names no format is of plain factors, and of no tokens to train on, not trained.

    One that names no mixture to train on was trained on what it was fitted to.
    """
    measured = (row.get(name) for name in MEASURED_ON)
    stored, trained = row.get("format", PLAIN.name), row.get("finetune_tokens") or 0
    mixture = (row.get("finetune_mixture") or row.get("calibration")) if trained else None
    return row["method"], row["structure"], tuple(row["blocks"] or ()), stored, trained, mixture, *measured
