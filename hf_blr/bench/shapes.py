"""The layers and ranks of the paper's tables (arXiv 2512.20861), and the ones that our planner would choose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hf_blr.plan.ranks import in_multiples, rank_step
from hf_blr.structures import BLRSpec, make_spec, structure_named, structures

PAPER_STRUCTURES = ("low_rank", "monarch", "blast")
#: whose plain form every other structure is compared with, beside dense
BASELINE = "low_rank"


@dataclass(frozen=True)
class Layer:
    """One kind of layer of a model.

    Args:
        name: as the tables print it.
        in_features, out_features: K and N.
        rank: R of low-rank and BLAST in the paper.
        monarch: the paper's (rank over all of a row of blocks, blocks); None where it has no Monarch.
        blast_blocks: the paper's blocks on each side.
        modules: regular expression for the endings of the module names in Transformers.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    monarch: tuple[int, int] | None
    blast_blocks: int
    modules: str

    def paper_spec(self, structure: str) -> BLRSpec:
        """The paper's sizes. Raises ValueError where it has none for this structure."""
        if structure == "monarch" and self.monarch is not None:
            total, blocks = self.monarch
            rank = total // blocks
        elif structure in ("low_rank", "blast"):
            rank, blocks = self.rank, 1 if structure == "low_rank" else self.blast_blocks
        else:
            raise ValueError(f"the paper has no {structure} for the layer {self.name}; leave :paper out")
        return structure_named(structure).spec(self.in_features, self.out_features, rank, (blocks, blocks))

    def specs(self, small: bool) -> list[BLRSpec]:
        """What is timed: the paper's sizes, other blocks at its rank, and what it does not have at as many parameters.

        small: of a model whose layers are cut into equal blocks only.
        """
        k, n, b = self.in_features, self.out_features, self.blast_blocks
        other_blocks = {(4, 4)} if small else {(4, 4), (2, 16), (4, 16), (4, 32)}
        found: list[BLRSpec] = []
        for record in structures().values():
            if record.name not in PAPER_STRUCTURES:
                found.append(aligned_spec(record.name, k, n, self.paper_spec(BASELINE).ratio))
            elif record.name == "monarch":
                total, blocks = self.monarch or (0, 0)
                found += [record.spec(k, n, total // c, (c, c)) for c in sorted({blocks, 4}) if total]
            elif record.name == "blast":
                pairs = [pair for pair in sorted({(b, b), *other_blocks}) if k % pair[0] == 0 and n % pair[1] == 0]
                found += [record.spec(k, n, self.rank, pair) for pair in pairs]
            else:
                found.append(self.paper_spec(record.name))
        return found


def aligned_spec(
    structure: str,
    in_features: int,
    out_features: int,
    ratio: float,
    num_blocks: tuple[int, int] | None = None,
    multiple: int | None = None,
) -> BLRSpec:
    """The spec of this budget with its rank cut to a multiple that the kernels like, where there is one.

    multiple: see `align_rank`.

    Raises:
        ValueError: as `make_spec`.
    """
    spec = make_spec(structure, in_features, out_features, ratio=ratio, num_blocks=num_blocks)
    return align_rank(spec, multiple)


def align_rank(spec: BLRSpec, multiple: int | None = None) -> BLRSpec:
    """Rows as long as the rank are multiples of `multiple` where that costs little, else they load in wide pieces."""
    if multiple is not None:
        cut = in_multiples(spec, multiple)
        if cut.rank % rank_step(spec, multiple) == 0:
            return cut
    wide = structure_named(spec.structure).rank_multiple
    return replace(spec, rank=spec.rank // wide * wide or spec.rank)


def typical_indices(spec: BLRSpec, device: torch.device | str) -> dict[str, torch.Tensor]:
    """{name: index} of the kind that fits give; of most structures none."""
    typical = structure_named(spec.structure).load("typical_indices")
    return {} if typical is None else typical(spec, device)


LLAMA_7B = (
    Layer("q,k,v,o", 4096, 4096, 1024, (1024, 16), 16, "[qkvo]_proj"),
    Layer("gate,up", 4096, 11008, 1488, (1536, 16), 16, "(gate|up)_proj"),
    Layer("down", 11008, 4096, 1488, (1536, 16), 16, "down_proj"),
)
LLAMA_1B = (
    Layer("q,o", 2048, 2048, 256, (256, 16), 16, "[qo]_proj"),
    Layer("gate", 2048, 8192, 512, (512, 16), 16, "gate_proj"),
    Layer("up", 2048, 8192, 768, (768, 16), 16, "up_proj"),
    Layer("down", 8192, 2048, 768, (768, 16), 16, "down_proj"),
)
GPT2_S = (
    Layer("c_attn", 768, 2304, 192, (192, 4), 6, "c_attn"),
    Layer("c_fc", 768, 3072, 192, (192, 4), 6, "c_fc"),
    Layer("mlp.c_proj", 3072, 768, 192, (192, 4), 6, r"mlp\.c_proj"),
)
VIT_B = (
    Layer("qkv", 768, 2304, 128, (128, 4), 3, "qkv"),
    Layer("fc1", 768, 3072, 128, (128, 4), 3, "fc1"),
    Layer("fc2", 3072, 768, 128, (128, 4), 3, "fc2"),
)
DIT_XL_2 = (
    Layer("qkv", 1152, 3456, 384, None, 9, "qkv"),
    Layer("fc1", 1152, 4608, 256, None, 9, r"ff\.net\.0\.proj"),
    Layer("adaLN", 1152, 6912, 256, None, 9, r"norm1\.linear"),
)
#: {model: its layers}, as the paper's table lists them
LAYERS = {"Llama-7B": LLAMA_7B, "Llama-3.2-1B": LLAMA_1B, "GPT2-S": GPT2_S, "ViT-B": VIT_B, "DiT-XL/2": DIT_XL_2}

# Transformers and diffusers hold q, k and v apart where the paper's code has one matrix of three times the outputs.
# These ranks store at most as much as the paper's: 128 * (768 + 2304) >= 3 * 80 * (768 + 768), and
# 384 * (1152 + 3456) = 3 * 256 * (1152 + 1152). Monarch's 80 over 4 blocks is 20 for each pair.
VIT_B_SPLIT = (
    Layer("q,k,v", 768, 768, 80, (80, 4), 3, "[qkv]_proj|query|key|value"),
    # two spellings each, of recent and of older releases of Transformers
    replace(VIT_B[1], modules=r"fc1|intermediate\.dense"),
    replace(VIT_B[2], modules=r"fc2|\d+\.output\.dense"),
)
DIT_XL_2_SPLIT = (Layer("q,k,v", 1152, 1152, 256, None, 9, "to_[qkv]"), *DIT_XL_2[1:])
