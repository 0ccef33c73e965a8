"""BLAST's mix: where it happens, how y and z are laid out for it, and tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_blr.ops.rules.device import INTERPRETER, Device, pow2


@dataclass(frozen=True)
class MixConfig:
    """Tiles over tokens and rank; `dot`: on tensor cores, one small product per rank index."""

    bt: int
    br: int
    dot: bool
    warps: int


def fuses_mix(b1: int, b2: int, q: int, rank: int, tokens: int) -> bool:
    """Whether BLAST's mix runs while the last stage loads, instead of in a kernel of its own.

    Whole layer of 4096 x 4096, H100, us fused and apart: 1024 tokens 4x16 blocks 54 and 56, 4x32 54 and 90,
    4x4 57 and 42; 128 tokens 4x16 39 and 22. With 16 blocks of 688 outputs, ragged for its tiles of 128, 197
    and 113.
    """
    return b1 <= 4 and b2 >= 16 and q % 128 == 0 and rank % 16 == 0 and tokens >= 512


def mixes_along_t(b1: int, b2: int) -> bool:
    """Whether y and z are best laid out with the tokens contiguous, for a mix on tensor cores.

    Whole layer, 1024 tokens, H100, us along t and along r: 4096 x 4096 with 16x16 blocks 71 and 77, 4x4 43
    and 41; 4096 x 11008 with 16x16 blocks 127 and 140, 4x16 103 and 119.
    """
    return b1 * b2 > 16


def mix_config(b1: int, b2: int, tokens: int, along_t: bool, device: Device) -> MixConfig:
    """For `blast_mix_kernel`: tensor cores for many pairs of blocks, or for some at few tokens."""
    dot = along_t or b1 * b2 > (64 if tokens > 512 else 16)
    if device == INTERPRETER:
        return MixConfig(16, 16, dot, 4)
    if along_t:
        return MixConfig(128, 4, True, 4)
    if not dot:
        # 16 bytes of one row for each thread
        return MixConfig(16, 64, False, 4)
    blocks = max(16, pow2(max(b1, b2)))
    return MixConfig(max(16, 512 // blocks), 32 if blocks <= 32 else 16, True, 8)


def ds_config(b1: int, b2: int, device: Device) -> MixConfig:
    """For `blast_ds_kernel`: as the mix of many tokens, with smaller tiles where it uses tensor cores."""
    config = mix_config(b1, b2, 1 << 20, False, device)
    return replace(config, br=16, warps=4) if config.dot else config


def ds_group(b1: int, b2: int) -> int:
    """Output blocks that a program of `blast_ds_kernel` takes: those that make 16 accumulators or fewer."""
    return max(g for g in range(1, b2 + 1) if b2 % g == 0 and g * b1 <= max(16, b1))
