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
    """Rows of weights per program and the length read at a time, from each of `parts` pieces of a row."""

    rows: int
    length: int
    warps: int
    stages: int


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
        return DecodeConfig(8, 16, 4, 1)
    longest = pow2(-(-row // parts))
    parts = pow2(parts)
    if tokens == 1 and mix and rows <= 8 * device.sms:
        # so many registers that each multiprocessor takes one program: with two on some and none on others,
        # which a little less allows, 4x4 blocks took 11.2 us a layer instead of 8.8 (4096 x 4096, H100)
        return DecodeConfig(8, max(16, min(longest, 2048 // parts)), 8, 2)
    if tokens == 1 and mix:
        return DecodeConfig(4, max(16, min(longest, 1024 // parts)), 8, 4)
    if tokens == 1:
        # about 32 KB of weights for each program
        tile = min(64, max(4, pow2(16384 // row)))
        # Monarch 4096 x 4096: 8.2 us a layer unrolled four times, 9.6 twice; 11008 x 4096: 26 and 22
        unroll = 4 if tile > 4 and rows <= 8 * device.sms else 2
        return DecodeConfig(tile, max(16, min(longest, 8192 // (parts * tile))), 4, unroll)
    tile = 8 if rows <= 8 * device.sms else 16
    if not mix:
        tile = min(32, max(tile, pow2(32768 // row)))
    length = max(16, min(longest, 1024 // parts, 16384 // (parts * tile)))
    stage = parts * length * (tile + decode_rows(tokens)) * itemsize
    while stage > device.shared_memory and length > 16:
        length, stage = length // 2, stage // 2
    return DecodeConfig(tile, length, 4, max(1, min(4, device.shared_memory // stage)))


def pivoted_project_config(parts: int, row: int, rows: int, tokens: int, itemsize: int, device: Device) -> DecodeConfig:
    """For `pivoted_project_kernel`, whose c has `rows` of `row` numbers."""
    config = project_config(parts, max(1, row), rows, tokens, False, itemsize, device)
    if tokens > 1 or device == INTERPRETER:
        return config
    # each step waits for its indices and then for x: few long steps, and programs enough for two to take turns
    return DecodeConfig(4, max(16, min(512, pow2(-(-row // parts)))), 4, 2)


def expand_config(rank: int, tokens: int, itemsize: int, device: Device) -> DecodeConfig:
    """For `decode_expand_kernel`."""
    if device == INTERPRETER:
        return DecodeConfig(16, 16, 4, 1)
    long = rank > 1024
    if tokens == 1:
        return DecodeConfig(8, 512, 8 if long else 4, 2)
    config = DecodeConfig(32, 128, 4, 6) if long else DecodeConfig(16, 256, 2, 4)
    stage = config.length * (config.rows + decode_rows(tokens)) * itemsize
    return replace(config, stages=max(1, min(config.stages, device.shared_memory // stage)))


def column_config(tokens: int, device: Device) -> ColumnConfig:
    """For `columns_kernel`: some 16 numbers a thread under way, and the indices read once for the tokens of a tile."""
    if device == INTERPRETER:
        return ColumnConfig(4, 16, 4)
    return ColumnConfig(min(8, pow2(tokens)), 256, 4)


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
