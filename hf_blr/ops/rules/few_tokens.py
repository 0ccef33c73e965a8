"""Which kernels for few tokens run, and how they are launched."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_blr.ops.rules.device import INTERPRETER, Device, pow2

#: up to here a layer is bound by reading its factors, and kernels made for that run
FEW_TOKENS = 32
#: rows of weights in a tile of `decode_stack`: the least that Hopper's products take
STACK_ROWS = 64
#: 32-bit registers of a multiprocessor
REGISTERS = 1 << 16


@dataclass(frozen=True)
class DecodeConfig:
    """Of 2 tokens and more, and of pivoted's first stage: rows of weights per program and the length read at a time,
    from each of the pieces of a row.

    early: how much of each piece is loaded into registers before the wait for the kernel before; the rest is asked for
        in L2.
    programs: of `decode_expand`, for each multiprocessor: these loop over tiles of `rows`, with a part of z for each
        warp; 0: a program for each tile.
    ahead: how many tiles such a program asks for in L2 before the wait, beyond those that its pipeline loads.
    """

    rows: int
    length: int
    warps: int
    stages: int
    early: int = 0
    programs: int = 0
    ahead: int = 0


@dataclass(frozen=True)
class OneConfig:
    """Of one token: rows of weights per program, the length read at a time, programs for each multiprocessor."""

    rows: int
    length: int
    warps: int
    programs: int

    @property
    def registers(self) -> int:
        """Of a thread, as many as let all programs stay."""
        return max(32, min(255, REGISTERS // (32 * self.warps * self.programs) // 8 * 8))


def runs_decode_kernels(tokens: int, b1: int, b2: int) -> bool:
    """Whether the kernels for few tokens run; they hold an accumulator for each block."""
    return tokens <= FEW_TOKENS and b1 <= 64 and b2 <= 64


def stacks(tokens: int, groups: int, rows: int, row: int, device: Device, mix: bool = False) -> bool:
    """Whether the first stage of few tokens is `decode_stack`'s: for `groups` x `rows` of `row` weights.

    H100, both stages, us by `decode_project` and by `decode_stack`: Monarch 4x4, 32 tokens, q, k, v 34.7 and 24.7, gate
    and up 50.9 and 41.8, o 13.7 and 13.3, 11008 x 4096 43.2 and 22.8; the last, 8 tokens, 22.3 and 20.8. BLAST, whose
    mix is a kernel of its own then, o 15.4 and 16.8, gate and up 49.9 and 52.5, 11008 x 4096 38.2 and 28.1 (16x16
    blocks 45.8 and 31.7), 8192 x 2048 20.5 and 16.1. Low-rank, whose few rows would keep most multiprocessors idle,
    o 15.6 and 19.7, cuBLAS 14.3: not there.

    Args:
        mix: BLAST's, where a row is read by parts in `groups`.
    """
    if tokens == 1 or groups == 1:
        return False
    if mix:
        return tokens > 16 and groups * row >= 8192
    programs = groups * -(-rows // STACK_ROWS)
    return tokens > 16 or (row > 2048 and 2 * programs > device.sms)


def stack_config(tokens: int, itemsize: int, device: Device) -> DecodeConfig:
    """For `decode_stack_kernel`."""
    if device == INTERPRETER:
        return DecodeConfig(16, 16, 4, 1)
    # steps of 128 bytes. H100, eight stages 22.8 us of 11008 x 4096, six 23.6, twelve 22.7 but q, k, v 26.8 instead of
    # 24.7
    stage = (STACK_ROWS + decode_rows(tokens)) * 128
    return DecodeConfig(STACK_ROWS, 128 // itemsize, 4, max(1, min(8, device.shared_memory // stage)))


def project_config(
    parts: int, row: int, rows: int, tokens: int, mix: bool, itemsize: int, device: Device
) -> DecodeConfig:
    """For `decode_project_kernel`; `rows` of `row` weights each, read in `parts` pieces at once."""
    if device == INTERPRETER:
        return DecodeConfig(8, 16, 4, 1, 32)
    longest, parts = pow2(-(-row // parts)), pow2(parts)
    few_rows = rows <= 8 * device.sms
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
    if outputs <= 32 * device.sms and tokens <= 16:
        # one program for each multiprocessor: all weights are on their way when z arrives (H100, us a layer:
        # 4096 x 4096 with 16 tokens 9.3, without 10.5; with twice the programs, 2048 x 8192, 10.2 and 9.1; with 32
        # tokens 33 and 15)
        room = device.shared_memory // ((32 + decode_rows(tokens)) * itemsize)
        config = DecodeConfig(32, 256, 4, 2, min(rank, 3072 // itemsize, room // 256 * 256))
    else:
        wide = wide_config(rank, outputs, tokens, itemsize, device)
        if wide is not None:
            return wide
        config = DecodeConfig(32, 128, 4, 6) if rank > 1024 else DecodeConfig(16, 256, 2, 4)
    stage = config.length * (config.rows + decode_rows(tokens)) * itemsize
    return replace(config, stages=max(1, min(config.stages, device.shared_memory // stage)))


def wide_config(rank: int, outputs: int, tokens: int, itemsize: int, device: Device) -> DecodeConfig | None:
    """For `decode_expand_wide_kernel`, where there is enough to loop over and z fits the registers; else None.

    H100, 16 tokens, us a layer with a program for each tile and so: 4096 x 11008, low-rank 25.5 and 22.4, BLAST 4x4
    24.4 and 22.5, Monarch 4x4 21.9 and 21.3; 2048 x 8192, low-rank 15.0 and 12.6, BLAST 4x4 13.7 and 13.8.
    """
    # rows of another length are not copied 16 bytes at a time, nor ahead
    if outputs <= 32 * device.sms or tokens > 16 or itemsize != 2 or not 512 <= rank <= 1536 or rank % 8:
        return None
    config = DecodeConfig(8, 128, 4, 3, programs=2, ahead=2 if rank > 1024 else 0)
    whole = -(-rank // (config.warps * config.length)) * config.warps * config.length
    memory = ((config.stages - 1) * config.rows + decode_rows(tokens)) * whole * itemsize
    return config if config.programs * memory <= device.shared_memory else None


def one_config(row: int, rows: int, layers: int, itemsize: int, device: Device) -> OneConfig:
    """For `decode_one_kernel`: `rows` of `row` weights in all blocks, of as many `layers` at once."""
    if device == INTERPRETER:
        return OneConfig(4, 16, 4, 1)
    # a warp reads 16 bytes for each of its lanes; as many share a row as its registers ask for
    length, sharing = 512 // itemsize, 1
    while -(-row // (length * sharing)) > 8 and sharing < 16:
        sharing *= 2
    steps = -(-row // (length * sharing))
    # of a thread, as compiled: this row and the next one, the vector, addresses; H100, us of Monarch's qkv of 4096,
    # 80 registers: 17.7 with the 24 warps that fit, 18.5 with 32, 19.0 with 16
    fitting = REGISTERS // (32 * steps * (20 if layers == 1 else 16))
    # few rows are spread over more programs
    warps = max(min(16, sharing * layers), 8 if fitting >= 16 and rows >= 16 * device.sms else 4)
    # the estimate of registers is rather high than low; rows of all layers lie side by side
    return OneConfig(max(1, warps // sharing // layers), length * sharing, warps, max(1, int(fitting / warps + 0.3)))


def one_mix_config(b1: int, part: int, itemsize: int, device: Device) -> OneConfig:
    """For `decode_one_mix_kernel`, whose rows are of B1 parts."""
    if device == INTERPRETER:
        return OneConfig(4, 16, 4, 1)

    def held(rows: int, warps: int) -> int:
        """32-bit registers of a thread: this tile and the next one, and the vector."""
        return 3 * b1 * part * rows * itemsize // (4 * 32 * warps)

    # H100, us of qkv and down of 4096 x 11008: 4x4 19.5 and 16.9, 16x16 20.0 and 18.2; other tiles up to 21 and 20
    rows, warps = (2 if held(2, 4) <= 120 else 1), 4
    while held(rows, warps) > 170 and warps < 16:
        warps *= 2
    # no longer than half a warp or a whole one reads, unless parts are too few for the warps
    length = max(512 // itemsize // rows, 512 // itemsize * warps // (rows * pow2(b1)))
    length = min(pow2(part), length)
    padded = held(rows, warps) * -(-part // length) * length // part
    return OneConfig(rows, length, warps, max(1, REGISTERS // (32 * warps * (padded + 36))))


def early_steps(config: DecodeConfig, length: int) -> int:
    """How many steps over a piece of this length have their weights loaded before the wait."""
    return -(-min(config.early, length) // config.length)


def lines(length: int, line: int) -> int:
    """A power of two of cache lines that covers a length, none for none."""
    return pow2(-(-length // line)) if length > 0 else 0


def decode_rows(tokens: int) -> int:
    """Tokens fill a tensor-core tile of at least 16 rows."""
    return max(16, pow2(tokens))
