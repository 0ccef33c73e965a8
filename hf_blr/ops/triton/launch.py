"""How each kernel is launched: pure functions of sizes, dtype and device properties.

There is no tuning at run time: each function returns the one setting that won on an H100, cut down until it
fits the shared memory of smaller cards. `benchmarks/NOTES.md` has what was tried.
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
class DecodeConfig:
    """Rows of weights per program and the length read at a time, from each of `parts` pieces of a row.

    early: of each piece, how much is loaded into registers before the wait for the kernel before; the rest is asked
        for in L2.
    """

    rows: int
    length: int
    warps: int
    stages: int
    early: int = 0


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


def gemm_config(chunk: int, tokens: int, itemsize: int, device: Device) -> GemmConfig:
    """For `block_gemm_kernel`; `chunk` is the length that is contiguous along the contraction."""
    if device == INTERPRETER:
        return SMALLEST_GEMM
    # two programs of 128 x 128 on a multiprocessor beat one of 128 x 256 by 7 % (20.3 and 22.2 us, 4 x
    # 1024^3, H100)
    bt = 128 if tokens > 64 else 64
    bk = min(128 // itemsize, max(16, largest_power_of_two(chunk)))
    return fit_gemm(GemmConfig(bt, 128, bk, 4, 3), itemsize, device)


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


def reads_swapped(rank: int) -> bool:
    """Whether Monarch's last stage reads y in place; other ranks are copied in order first."""
    return rank % 32 == 0


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


def decodes(tokens: int, b1: int, b2: int) -> bool:
    """Whether the kernels for few tokens run; they hold an accumulator for each block."""
    from hf_blr.ops.dispatch import FEW_TOKENS

    return tokens <= FEW_TOKENS and b1 <= 64 and b2 <= 64


def project_config(
    parts: int, row: int, rows: int, tokens: int, mix: bool, itemsize: int, device: Device
) -> DecodeConfig:
    """For `decode_project_kernel`; `rows` of `row` weights each, read in `parts` pieces at once."""
    if device == INTERPRETER:
        return DecodeConfig(8, 16, 4, 1, 32)
    part = -(-row // parts)
    longest = pow2(part)
    parts = pow2(parts)
    few_rows = rows <= 8 * device.sms
    if tokens == 1:
        if row < 2048:
            tile = 8 if few_rows else 4
        else:
            tile = 8 if not few_rows and 4096 <= row <= 8192 else 4
        warps = 4 if row < 4096 else 8
        # two programs fit on a multiprocessor at the greater length, three at the smaller: where there are more rows
        # than those two take, the third is worth more (4096 x 11008, H100: 19.0 us a layer and 20.3)
        width = 2048 if warps == 8 and (few_rows or row > 8192) else 512 if few_rows and row < 2048 else 1024
        length = max(16, min(longest, width // parts))
        # 32-bit registers of a thread that hold weights, and sums
        held = parts * tile * (part * itemsize // 4 + length) // (32 * warps)
        return DecodeConfig(tile, length, warps, 2, part if held <= 150 else 0)
    # more programs than multiprocessors before longer rows
    tile = 8
    if not few_rows:
        tile = 16
    elif not mix and rows > 2 * device.sms:
        tile = min(16, max(8, pow2(32768 // row)))
    length = max(16, min(longest, (512 if rows <= 2 * device.sms else 1024) // parts, 16384 // (parts * tile)))
    # short rows leave room for the second stage's programs, which would otherwise start late
    room = device.shared_memory if row >= 4096 else min(device.shared_memory, 1 << 17)
    stage = parts * length * (tile + decode_rows(tokens)) * itemsize
    while stage > room and length > 16:
        length, stage = length // 2, stage // 2
    return DecodeConfig(tile, length, 4, max(1, min(4, room // stage)))


def pivoted_project_config(parts: int, row: int, rows: int, itemsize: int, device: Device) -> DecodeConfig:
    """For `pivoted_project_kernel`, whose c has `rows` of `row` numbers."""
    if device == INTERPRETER:
        return DecodeConfig(8, 16, 4, 1, 32)
    part = max(1, -(-row // parts))
    length = max(16, min(256, pow2(part)))
    # H100, us a layer, 4096 x 4096 with 1184 rows: 8.6 and 9.6; with 1664 rows 22.2 and 20.6
    tile, warps = (4, 4) if rows <= 10 * device.sms else (8, 16)
    held = parts * tile * (part * itemsize // 4 + length) // (32 * warps)
    return DecodeConfig(tile, length, warps, 2, part if held <= 160 else 0)


def expand_config(rank: int, outputs: int, tokens: int, itemsize: int, device: Device) -> DecodeConfig:
    """For `decode_expand_kernel`; `outputs` of all blocks and layers."""
    if device == INTERPRETER:
        return DecodeConfig(16, 16, 4, 1, 32)
    if tokens == 1:
        return DecodeConfig(8, 256, 4, 2, min(rank, 4096 // itemsize))
    if outputs <= 32 * device.sms and tokens <= 16:
        # one program for each multiprocessor: all weights are on their way when z arrives (H100, us a layer:
        # 4096 x 4096 with 16 tokens 9.3, without 10.5; with twice the programs, 2048 x 8192, 10.2 and 9.1; with 32
        # tokens 33 and 15)
        room = device.shared_memory // ((32 + decode_rows(tokens)) * itemsize)
        config = DecodeConfig(32, 256, 4, 2, min(rank, 3072 // itemsize, room // 256 * 256))
    else:
        config = DecodeConfig(32, 128, 4, 6) if rank > 1024 else DecodeConfig(16, 256, 2, 4)
    stage = config.length * (config.rows + decode_rows(tokens)) * itemsize
    return replace(config, stages=max(1, min(config.stages, device.shared_memory // stage)))


def early_steps(config: DecodeConfig, length: int) -> int:
    """How many steps over a piece of this length have their weights loaded before the wait."""
    return -(-min(config.early, length) // config.length)


def lines(length: int, line: int) -> int:
    """A power of two of cache lines that covers a length, none for none."""
    return pow2(-(-length // line)) if length > 0 else 0


def column_config(device: Device) -> ColumnConfig:
    """For `columns_kernel`.

    Long tiles of one token each: 1024 x 4096, H100, us of the gather and of the scatter 11.5 and 13.1, with 8 tokens to
    a tile of 256 columns 12.3 and 25.6; a copy of x takes 10.3.
    """
    if device == INTERPRETER:
        return ColumnConfig(4, 16, 4)
    return ColumnConfig(1, 1024, 4)


def decode_rows(tokens: int) -> int:
    """One token is multiplied on the plain cores; more fill a tensor-core tile of at least 16 rows."""
    return 1 if tokens == 1 else max(16, pow2(tokens))


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
