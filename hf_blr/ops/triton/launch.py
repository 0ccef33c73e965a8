"""How each kernel is launched: pure functions of sizes, dtype and device properties.

There is no tuning at run time: each function returns the one setting that won on an H100, cut down until it
fits the shared memory of smaller cards. `docs/log.md` has what was tried.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Device:
    """What a launch choice may depend on."""

    capability: tuple[int, int]
    sms: int
    #: bytes that one program may have
    shared_memory: int

    @property
    def is_hopper(self) -> bool:
        """Has tensor-copy descriptors, and launches that overlap the end of the kernel before."""
        return self.capability >= (9, 0)

    @property
    def launch_options(self) -> dict:
        """Of a kernel that takes part in such launches; older cards know no such option."""
        return {"launch_pdl": True} if self.is_hopper else {}


#: where the interpreter runs: no Hopper features, and tiles as small as they come
INTERPRETER = Device((8, 0), 1, 0)


@dataclass(frozen=True)
class GemmConfig:
    """Tiles over tokens, outputs and the contracted length, and compiler settings."""

    bt: int
    bn: int
    bk: int
    warps: int
    stages: int


@dataclass(frozen=True)
class MixConfig:
    """Tiles over tokens and rank; `dot`: on tensor cores, one small product per rank index."""

    bt: int
    br: int
    dot: bool
    warps: int


@dataclass(frozen=True)
class ColumnConfig:
    """Tiles over tokens and columns of a kernel that moves columns."""

    bt: int
    bc: int
    warps: int


SMALLEST_GEMM = GemmConfig(16, 16, 16, 4, 1)


def device_of(x: torch.Tensor) -> Device:
    return cuda_device(x.device.index) if x.is_cuda else INTERPRETER


@functools.cache
def cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device((p.major, p.minor), p.multi_processor_count, p.shared_memory_per_block_optin)


def gemm_config(chunk: int, tokens: int, itemsize: int, device: Device, activates: bool = False) -> GemmConfig:
    """For `block_gemm_kernel`; `chunk` is the length that is contiguous along the contraction."""
    if device == INTERPRETER:
        return SMALLEST_GEMM
    # two programs of 128 x 128 on a multiprocessor beat one of 128 x 256 by 7 % (20.3 and 22.2 us, 4 x
    # 1024^3, H100)
    bt = 128 if tokens > 64 else 64
    bk = min(128 // itemsize, max(16, largest_power_of_two(chunk)))
    # more warps share what an activation costs: 8192 x 304 x 3072 with a tanh 63.1 and 67.2 us, H100
    return fit_gemm(GemmConfig(bt, 128, bk, 8 if activates else 4, 3), itemsize, device)


def fused_mix_config(b1: int, itemsize: int, device: Device) -> GemmConfig:
    """For `blast_expand_kernel`, whose B1 + 1 tiles per step must leave room for a second program."""
    if device == INTERPRETER:
        return SMALLEST_GEMM
    config = GemmConfig(128, 128, 128 // itemsize, 4, 2)
    return fit_gemm(config, itemsize, device, tiles_a=b1)


def fit_gemm(config: GemmConfig, itemsize: int, device: Device, tiles_a: int = 1) -> GemmConfig:
    """The config with fewer stages, then a shorter step, then smaller tiles, until it fits."""

    def fits(c):
        return c.stages * (tiles_a * c.bt + c.bn) * c.bk * itemsize <= device.shared_memory

    while not fits(config):
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        elif config.bk > 32:
            config = replace(config, bk=config.bk // 2)
        else:
            config = replace(config, bt=config.bt // 2)
    return config


def fuses_mix(b1: int, b2: int, q: int, rank: int, tokens: int) -> bool:
    """Whether BLAST's mix runs while the last stage loads, instead of in a kernel of its own.

    Whole layer of 4096 x 4096, H100, us fused and apart: 1024 tokens 4x16 blocks 54 and 56, 4x32 54 and 90,
    4x4 57 and 42; 128 tokens 4x16 39 and 22. With 16 blocks of 688 outputs, ragged for its tiles of 128, 197
    and 113.
    """
    return b1 <= 4 and b2 >= 16 and q % 128 == 0 and rank % 16 == 0 and tokens >= 512


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


def gemm_tiles(tokens: int, q: int, blocks: int) -> int:
    """Of 128 x 128 outputs, as many programs as `gemm_config` asks for at many tokens."""
    return blocks * -(-q // 128) * -(-tokens // 128)


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


def column_config(device: Device) -> ColumnConfig:
    """For `columns_kernel`.

    Long tiles of one token each: 1024 x 4096, H100, us of the gather and of the scatter 11.5 and 13.1, with 8 tokens to
    a tile of 256 columns 12.3 and 25.6; a copy of x takes 10.3.
    """
    if device == INTERPRETER:
        return ColumnConfig(4, 16, 4)
    return ColumnConfig(1, 1024, 4)


def swap_config(device: Device) -> ColumnConfig:
    """For `swap_blocks_kernel`: 8192 tokens, 4 x 4 blocks of rank 256, 51.6 us, H100; 1 x 1024 51.5, 8 x 256 52.4."""
    return ColumnConfig(4, 16, 4) if device == INTERPRETER else ColumnConfig(4, 512, 4)


def vector_width(*sizes: int) -> int:
    """The largest power of two up to 16 that divides every size.

    Triton sees alignment only in multiples of 16; sizes divided by this and multiplied back in the kernel
    show it the rest.
    """
    width = 16
    while any(size % width for size in sizes):
        width //= 2
    return width


def dot_precision(dtype: torch.dtype) -> str:
    """float32 inputs are multiplied in float32, as PyTorch does by default; the others have one way."""
    return "ieee" if dtype == torch.float32 else "tf32"


def pow2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def largest_power_of_two(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n
