"""The route of a BLAST layer: which kernels run, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from hf_blr.ops.rules.device import Device
from hf_blr.ops.rules.few_tokens import runs_decode_kernels, stacks
from hf_blr.ops.rules.mix import fuses_mix, mixes_along_t


@dataclass(frozen=True)
class BlastRoute:
    """What runs.

    Args:
        few: the kernels for few tokens; the mix is inside their first stage.
        stacked: of these, the first stage is a stack of products, and the mix a kernel of its own.
        fused: at many tokens, the mix is inside the last stage; else a kernel of its own.
        along_t: y and z are laid out with the tokens contiguous.
    """

    few: bool
    stacked: bool
    fused: bool
    along_t: bool


def blast_route(
    tokens: int,
    blocks: tuple[int, int],
    sizes: tuple[int, int, int],
    device: Device,
    adds: bool = False,
    keep: bool = False,
    layers: int = 1,
) -> BlastRoute:
    """The route of one layer, or of one of several that run together.

    Args:
        tokens: T.
        blocks: (B1, B2).
        sizes: (P, Q, R).
        device: the card.
        adds: whether a bias is added or an activation applied.
        keep: whether y is kept for a backward.
        layers: how many of this size share the first stage.
    """
    (b1, b2), (p, q, r) = blocks, sizes
    few = runs_decode_kernels(tokens, b1, b2) and not keep
    stacked = few and stacks(tokens, b1, layers * r, p, device, mix=True)
    fused = not few and fuses_mix(b1, b2, q, r, tokens)
    # a y that is kept is laid out along r, and the kernel that adds a bias or activates reads z along r
    along_t = not few and mixes_along_t(b1, b2) and not (fused or keep or adds)
    return BlastRoute(few, stacked, fused, along_t)
