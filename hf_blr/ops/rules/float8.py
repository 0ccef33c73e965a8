"""Products of float8: tiles, and of the cast before them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_blr.ops.rules.columns import ColumnConfig
from hf_blr.ops.rules.device import INTERPRETER, Device, pow2
from hf_blr.ops.rules.products import GemmConfig, fit_gemm, gemm_tiles


@dataclass(frozen=True)
class Float8Config(GemmConfig):
    """Tiles of `float8_gemm_kernel`, which are bn + beside outputs wide."""

    beside: int = 0
    #: programs that stay on an SM and go from tile to tile; 0: a program a tile
    stays: int = 0

    @property
    def outputs(self) -> int:
        return self.bn + self.beside


SMALLEST = Float8Config(16, 16, 16, 4, 1)


def float8_config(tokens: int, n: int, k: int, groups: int, device: Device) -> Float8Config:
    """For `float8_gemm_kernel`: `groups` products of n outputs, of sums of length k.

    H200, us of one product with a graph's start. Tiles of 128 x 128, of which an SM has two, of 128 x 192 and of
    128 x 256: 4096 tokens, 4096 -> 1536 50.2, 46.5 and 50.9; 14336 -> 1536 155, 133 and 151, -> 1584 159, 194 and 150;
    1536 -> 14336 163, 203 and 174; 16 of 3584 -> 384 135, 152 and 197. Of fewer tiles than SMs, 1024 tokens: 64 x 128
    with 4 and 7 steps on their way 15.0 and 14.5 (4096 -> 1024); 128 x 128 by 8 warps with 4 and 6 steps, and 64 x 192,
    4096 -> 1536 18.3, 18.3 and 17.7, 14336 -> 1536 44.5, 43.7 and 37.9.
    """
    if device == INTERPRETER:
        return SMALLEST
    rows = groups * -(-tokens // 128)
    tiles, thin = rows * -(-n // 128), groups * -(-tokens // 64) * -(-n // 192)
    half, narrow, wide = (busy(rows, n, width, places * device.sms) for width, places in ((128, 2), (192, 1), (256, 1)))
    if tokens <= 64 or 2 * tiles <= device.sms:
        config = Float8Config(64, 128, 128, 4, 7)
    elif tiles <= device.sms and n % 192 == 0 and 0.9 * device.sms <= thin <= device.sms:
        config = Float8Config(64, 128, 128, 4, 6, beside=64)
    elif tiles <= device.sms:
        config = Float8Config(128, 128, 128, 8, 6)
    elif tiles > 2 * device.sms and k > 1024 and narrow > 1.2 * half:
        config = Float8Config(128, 128, 128, 8, 5, beside=64)
    elif k > 4096 and wide >= half:
        config = Float8Config(128, 256, 128, 8, 3)
    else:
        # staying: last stages take 8 % less, first ones 3 %, in the mean of 22 of more than one round
        config = Float8Config(128, 128, 128, 4, 3, stays=2 * (tiles > 2 * device.sms))
    return fit_gemm(replace(config, bn=min(config.bn, max(64, pow2(n)))), 1, device)


def busy(rows: int, n: int, width: int, places: int) -> float:
    """The share of the time in which tiles of n outputs in all keep these places busy: the last round is not full."""
    rounds = -(-rows * -(-n // width) // places)
    return rows * n / width / (rounds * places)


def multiplies_by_cublas(tokens: int, n: int, rounds_to_bfloat16: bool, activates: bool, device: Device) -> bool:
    """Whether a last stage with one block is cuBLAS', whose tiles read L2 half as often as ours.

    It gives bfloat16 alone where each row has a scale. H200, us of both with a graph's start: 4096 tokens, 1024 -> 4096
    32 and 39, 1584 -> 14336 163 and 222; of few tiles, 1024 tokens, 400 -> 1024, 14.7 and 10.4.
    """
    many = -(-tokens // 128) * -(-n // 128) > device.sms
    return many and rounds_to_bfloat16 and not activates and n % 16 == 0


def last_tiles(tokens: int, n: int, device: Device) -> int:
    """Of 128 x 128 outputs, in a last stage of one block that is ours; 0 where it is cuBLAS'."""
    return 0 if multiplies_by_cublas(tokens, n, True, False, device) else gemm_tiles(tokens, n, 1)


@dataclass(frozen=True)
class Float8MixConfig:
    """Of `float8_mix_kernel`.

    Args:
        groups: of warps, each with output blocks of its own.
        bt, br: tokens at a time, and ranks, of a program; a word of four ranks for each thread.
        ahead: steps that y is asked for before its turn.
        programs: on an SM at once.
    """

    groups: int
    bt: int
    br: int
    warps: int
    ahead: int
    programs: int


def float8_mix_config(b1: int, b2: int, device: Device) -> Float8MixConfig:
    """For `float8_mix_kernel`: a thread has weights of up to 64 block pairs, in two registers each."""
    if device == INTERPRETER:
        return Float8MixConfig(2, 4, 16, 4, 1, 3)
    groups = 1
    while b1 * -(-b2 // groups) > 64 and groups < b2:
        groups *= 2
    warps, rows, ahead = max(4, groups), -(-b2 // groups), 1
    # weights, y, sums, and the rest
    registers = 2 * rows * b1 + ahead * b1 + 2 * rows + 16
    return Float8MixConfig(groups, 2 * warps // groups, 64, warps, ahead, min(64, 2048 // registers) // warps)


def weights_config(b1: int, rank: int, device: Device) -> tuple[int, int]:
    """(ranks at a time, warps) for `mix_weights_kernel`: registers that two programs of the first stage leave free."""
    if device == INTERPRETER:
        return 16, 4
    return max(16, min(pow2(rank), 4096 // pow2(b1))), 4


def cast_config(k: int, device: Device) -> ColumnConfig:
    """For `cast_rows_kernel`, of which a program takes one token whole, some columns at a time."""
    if device == INTERPRETER:
        return ColumnConfig(1, 16, 4)
    return ColumnConfig(1, min(4096, pow2(k)), 4 if k <= 8192 else 8)


@dataclass(frozen=True)
class ColumnTiles:
    """A cast of columns: (rows, columns, warps) of the tiles that are summed and of those that are cast.

    chunk: rows whose squares a program sums, of both kinds of tiles a multiple.
    """

    summed: tuple[int, int, int]
    cast: tuple[int, int, int]
    chunk: int


def column_tiles(m: int, length: int, device: Device) -> ColumnTiles:
    """For `column_squares_kernel` and `cast_columns_kernel`: rows of 128 bytes, and chunks for two programs an SM.

    Columns whole, 16 a program, took 68 us for 14336 x 1584 and left most of the SMs idle (H200).
    """
    if device == INTERPRETER:
        return ColumnTiles((16, 16, 4), (16, 16, 4), 32)
    rows, columns = 256, 64
    programs = -(-2 * device.sms // -(-length // columns))
    return ColumnTiles((rows, columns, 8), (64, columns, 2), rows * -(-m // (rows * programs)))


def transpose_tile(m: int, length: int, device: Device) -> tuple[int, int]:
    """(side of a tile, warps) for `transpose_codes_kernel`: 128 bytes a line, unless that leaves SMs idle."""
    if device == INTERPRETER:
        return 16, 4
    return (128, 8) if -(-m // 128) * -(-length // 128) >= 2 * device.sms else (64, 4)
