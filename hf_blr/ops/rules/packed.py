"""Factors in bits at few tokens: which of them kernels read as they are, and how these are launched."""

from __future__ import annotations

from dataclasses import replace

from hf_blr.ops.rules.device import INTERPRETER, Device, largest_power_of_two, pow2
from hf_blr.ops.rules.few_tokens import DecodeConfig, OneConfig, decode_rows
from hf_blr.structures.spec import FACTOR, BLRSpec

#: {form of a factor: numbers that one column of what is stored holds}
PER_WORD = {"plain": 1, "int4": 8, "int8": 4, "fp8": 4}


def reads_packed(spec: BLRSpec, bits: int, group_size: int | None, float8: bool) -> bool:
    """Whether the kernels for few tokens read a layer's factors in this form; else they become numbers first.

    Products take 16 numbers at a time, which must lie in one group. Bytes of float8 are read as words.
    """
    if max(spec.num_blocks) > 64 or bits not in (4, 8) or (group_size or 16) % 16:
        return False
    lengths = [shape[-1] for name, shape in spec.shapes(FACTOR).items() if name not in spec.elementwise]
    return not (float8 and any(length % 4 for length in lengths))


def word_vector(per: int) -> int:
    """Words that a thread of one token's kernels reads at once: as many as meet the 16 bytes of x that it loads."""
    return 8 // per


def packed_one_config(row: int, rows: int, layers: int, per: int, device: Device) -> OneConfig:
    """For `decode_one_kernel` with a matrix in bits: `rows` of `row` weights in all blocks, of as many `layers`."""
    if device == INTERPRETER:
        return OneConfig(4, 16, 4, 1)
    warps = 4 if row <= 8192 else 8
    length = min(pow2(row), 8 * 32 * warps)
    tile = 8 if rows >= 64 * device.sms else 4
    return OneConfig(tile, length, warps, 16 // warps)


def packed_project_config(
    parts: int, row: int, rows: int, tokens: int, mix: bool, group: int, itemsize: int, device: Device
) -> DecodeConfig:
    """As `few_tokens.project_config` with a matrix in bits; `group`: numbers that share a scale, 0 for a row."""
    length = step_within(group, 16 if device == INTERPRETER else 128)
    if device == INTERPRETER:
        return DecodeConfig(8, length, 4, 1)
    parts = pow2(parts)
    tile = 8 if rows <= 8 * device.sms else 16
    length = max(16, min(length, pow2(-(-row // parts)), 8192 // (parts * tile)))
    stage = parts * length * (tile + decode_rows(tokens)) * itemsize
    return DecodeConfig(tile, length, 4, max(1, min(4, device.shared_memory // stage)))


def packed_expand_config(
    rank: int, outputs: int, tokens: int, group: int, itemsize: int, device: Device
) -> DecodeConfig:
    """As `few_tokens.expand_config` with a matrix in bits; `group` as in `packed_project_config`."""
    length = step_within(group, 16 if device == INTERPRETER else 128)
    if device == INTERPRETER:
        return DecodeConfig(16, length, 4, 1, 32)
    tile = 32 if outputs <= 64 * device.sms else 64
    early = rank if rank <= 1024 else 0
    return DecodeConfig(tile, length, 4, 4, early)


def packed_stack_config(config: DecodeConfig, group: int) -> DecodeConfig:
    """As `few_tokens.stack_config` gives it, with steps that lie in one group."""
    return replace(config, length=step_within(group, config.length))


def step_within(group: int, length: int) -> int:
    """The longest step of at most this length that lies in one group wherever it begins: a power of two of it."""
    return min(length, largest_power_of_two(group)) if group else length


def packed_one_mix_config(b1: int, part: int, rows: int, per: int, device: Device) -> OneConfig:
    """As `few_tokens.one_mix_config` with `rows` rows in bits."""
    if device == INTERPRETER:
        return OneConfig(4, 16, 4, 1)
    # a warp's part of a row, 8 numbers a lane
    length = min(pow2(part), 256)
    return OneConfig(4 if rows > 8 * device.sms else 2, length, 4, 4)
