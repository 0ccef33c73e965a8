"""Monarch's last stage: which of two ways to read the first stage's result."""

from __future__ import annotations

from hf_blr.ops.rules.device import largest_power_of_two
from hf_blr.ops.rules.products import gemm_tiles

#: {step along the rank: (outputs of a block from which, tiles of 128 x 128 up to which, where each sums 16 steps or
#: more) a copy and cuBLAS are faster}
SWAPPED = {64: (3072, 64), 32: (1536, 128), 16: (512, 64)}


def reads_swapped(b1: int, b2: int, q: int, rank: int, tokens: int, adds: bool = False) -> bool:
    """Whether Monarch's last stage reads y in place, in a kernel of ours; else y is copied in order for cuBLAS first.

    cuBLAS is faster by more than the copy where it is much to multiply, where too few tiles with long sums fill the
    card, and where the rank lets ours take short steps only. Whole layers, H100, us in place and copied: 1024 tokens,
    4096 x 4096 37 and 41, gate and up of 4096 x 11008 (steps of 32) 177 and 141, of 4096 x 14336 (of 64) 195 and 185,
    2048 x 8192 with 16 x 16 blocks (of 16) 74 and 57; 128 tokens, 11008 x 4096 49 and 35.

    Args:
        b1, b2, q: input and output blocks, of all layers of one launch, and outputs of each.
        rank: of each pair of blocks.
        adds: a bias, or an activation: then both ways end in a kernel of ours.
    """
    step = min(64, largest_power_of_two(rank))
    if adds or step < 16:
        return step >= 32
    outputs, few = SWAPPED[step]
    return q < outputs and (gemm_tiles(tokens, q, b2) > few or b1 * rank < 16 * step)
