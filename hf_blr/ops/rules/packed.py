"""Factors in bits at few tokens: which of them kernels read as they are, and how these are launched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_blr.ops.rules.device import INTERPRETER, Device, largest_power_of_two, pow2
from hf_blr.ops.rules.few_tokens import DecodeConfig, OneConfig, decode_rows
from hf_blr.structures.spec import FACTOR, BLRSpec

if TYPE_CHECKING:
    from hf_blr.ops.rules.bits import CodeForm

#: {form of a factor: numbers that one column of what is stored holds}
PER_WORD = {"plain": 1, "int4": 8, "int8": 4, "fp8": 4}
#: words whose numbers of one place tensor cores multiply at once
CHUNK = 16
#: of these that follow each other without a loop
MOST_STEPS = 8


def reads_packed(spec: BLRSpec, form: CodeForm) -> bool:
    """Whether the kernels for few tokens read a layer's factors in this form; else they become numbers first.

    Products take 16 numbers at a time, which must lie in one group. Bytes of float8 are read as words.
    """
    if max(spec.num_blocks) > 64 or form.bits not in (4, 8) or (form.group_size or 16) % 16:
        return False
    lengths = [shape[-1] for name, shape in spec.shapes(FACTOR).items() if name not in spec.elementwise]
    return not (form.float8 and any(length % 4 for length in lengths))


def word_vector(per: int) -> int:
    """Words that a thread of one token's kernels reads at once: as many as meet the 16 bytes of x that it loads."""
    return 8 // per


def steps_of(columns: int, step: int, least: int) -> tuple[int, int]:
    """(steps, tail) of a row: at least one step, and a power of two that holds the rest; 0: nothing is left.

    A tail is as long as what a warp reads at once, `least`, or longer: a shorter one saves nothing. One that is longer
    than half a step becomes a step.
    """
    steps, rest = divmod(columns, step)
    tail = max(least, pow2(rest)) if rest else 0
    return (steps + 1, 0) if 2 * tail > step or not steps else (steps, tail)


def packed_one_config(row: int, rows: int, layers: int, per: int, device: Device) -> OneConfig:
    """As `few_tokens.one_config` with a matrix in bits.

    H200, ms of a token of Llama-3-8B in low-rank at half, one stage changed, the best of three to seven settings and
    what was the rule before: 1584 numbers a row, int4 1.85, 1.89, fp8 2.07, 2.11; 1024 1.83, 1.89 and 2.07, 2.12; 400
    1.87, 1.89 and 2.09, 2.11; 4096, 3168 rows 1.86, 1.89 and 2.02, 2.09; 1824 rows 1.85, 1.89 and 2.07, 2.12. One run.
    All together, in a process that captures once: 1.65, 1.80 and 1.91, 2.04.
    """
    if device == INTERPRETER:
        return OneConfig(4, 16, 4, 1)
    small = per == 8
    if row <= 2048 and layers > 1:
        return OneConfig(8, min(pow2(row), 256), 4, 4 if small else 3)
    if row <= 512:
        return OneConfig(4, min(pow2(row), 256), 1, 8) if small else OneConfig(8, min(pow2(row), 256), 4, 4)
    if row <= 1024:
        return OneConfig(8, 256, 2, 8) if small else OneConfig(8, 512, 2, 8)
    if row <= 2048:
        return OneConfig(8, 256, 4, 4) if small else OneConfig(4, 256, 4, 4)
    if row <= 8192:
        # of few rows the programs have one tile each
        config = OneConfig(8, 1024, 4, 3) if rows <= 8 * device.sms else OneConfig(2, 1024, 4, 6)
        return replace(config, rows=config.rows // layers, length=config.length // layers)
    if row <= 16384:
        tile, length = (4, 2048) if small else (2, 4096)
        return OneConfig(tile // layers, length // layers, 8, 2)
    # one row: two spill. Not timed
    return OneConfig(1, 4096, 16, 1)


def packed_one_mix_config(b1: int, part: int, rows: int, device: Device) -> OneConfig:
    """As `few_tokens.one_mix_config` with `rows` rows in bits; not timed."""
    if device == INTERPRETER:
        return OneConfig(4, 16, 4, 1)
    return OneConfig(4 if rows > 8 * device.sms else 2, min(pow2(part), 256), 4, 4)


def packed_project_config(parts: int, row: int, rows: int, tokens: int, itemsize: int, device: Device) -> DecodeConfig:
    """As `few_tokens.project_config` with a matrix in bits.

    H200, 16 tokens, us a low-rank layer in int4 with groups of 128, 8 and 16 rows, then 32: 4096 x 4096 12.8, 15.7,
    22.6; 4096 x 14336 - , 26.0, 32.3. In fp8, 8 rows in steps of 128 and 256: 11.8, 11.3 and - , 26.3.
    Two runs, which differ by 5 % at most.
    """
    if device == INTERPRETER:
        return DecodeConfig(8, 16, 4, 1)
    parts = pow2(parts)
    tile = 8 if rows <= 8 * device.sms else 16
    length = max(16, min(128, pow2(-(-row // parts)), 8192 // (parts * tile)))
    stage = parts * length * (tile + decode_rows(tokens)) * itemsize
    return DecodeConfig(tile, length, 4, max(1, min(4, device.shared_memory // stage)))


def packed_expand_config(outputs: int, tokens: int, itemsize: int, device: Device) -> DecodeConfig:
    """As `few_tokens.expand_config` with a matrix in bits.

    H200, us a low-rank layer, 32 rows, 64 rows and 64 rows by 8 warps: 4096 x 4096, 16 tokens, int4 with groups of 128
    11.9, 13.9, 14.9, fp8 10.0, 11.7, 11.5; 4096 x 14336, 16 tokens, 28.4, 25.4, 35.6 and 26.9, 25.5, 25.5; 32 tokens,
    int4, 64 rows 39.9, by 8 warps 34.1. With all weights loaded before the wait 12.8 instead of 11.9. Two runs, which
    differ by 5 % at most.
    """
    if device == INTERPRETER:
        return DecodeConfig(16, 16, 4, 1)
    tile, length = 32 if outputs <= 64 * device.sms else 64, 128
    warps = 8 if tile == 64 and tokens > 16 else 4
    stage = length * (tile + decode_rows(tokens)) * itemsize
    return DecodeConfig(tile, length, warps, max(1, min(4, device.shared_memory // stage)))


def within_groups(config: DecodeConfig, group: int) -> DecodeConfig:
    """The setting with the longest steps, of its length at most, each of which lies in one group; 0: no groups."""
    return replace(config, length=min(config.length, largest_power_of_two(group))) if group else config


@dataclass(frozen=True)
class PlacesConfig:
    """Of `decode_places_kernel`: tiles of 16 rows of weights that a program has.

    parts: of a row in one program, a warp each.
    splits: programs that share a row of a first stage; their sums are added by one kernel more.
    ahead: steps of 16 words of a part that are loaded before the wait, where up to `MOST_STEPS` follow each other
        without a loop; 0: a loop loads one ahead.
    groups: of tokens, at least 8 each, that have programs of their own.
    changed: whether lanes of int4 load inputs from different banks, as `place_tiles.py` says.
    """

    tiles: int
    parts: int
    splits: int = 1
    ahead: int = 0
    groups: int = 1
    changed: bool = False


#: {stage: settings in int4 and in bytes up to 16 tokens, and in int4 and in bytes from 17 on}; layers share the parts
PLACES = {
    # last stages: two layers at once, many rows, rows of more than 1024 numbers, of fewer
    "gated": (PlacesConfig(4, 4), PlacesConfig(2, 4), PlacesConfig(4, 4), PlacesConfig(4, 4)),
    "wide": (PlacesConfig(4, 4), PlacesConfig(2, 4), PlacesConfig(4, 4), PlacesConfig(4, 4)),
    "last": (PlacesConfig(1, 4), PlacesConfig(1, 8), PlacesConfig(2, 8), PlacesConfig(2, 8)),
    "short": (PlacesConfig(2, 8), PlacesConfig(1, 8), PlacesConfig(2, 8), PlacesConfig(2, 8)),
    # first stages: rows of more than 8192 numbers, many rows, few
    "long": (PlacesConfig(3, 8, 4), PlacesConfig(1, 16), PlacesConfig(3, 8, 4), PlacesConfig(3, 8, 4)),
    "first": (PlacesConfig(2, 8), PlacesConfig(2, 16), PlacesConfig(2, 8), PlacesConfig(2, 8)),
    "few": (PlacesConfig(1, 16), PlacesConfig(1, 16), PlacesConfig(1, 8), PlacesConfig(1, 16)),
}
#: in int4 with groups, up to 16 tokens; few rows whose tiles leave half of the multiprocessors idle are "fewest"
IN_GROUPS = {
    "wide": PlacesConfig(4, 4, changed=True),
    "last": PlacesConfig(2, 8, ahead=2),
    "short": PlacesConfig(2, 8, ahead=1, changed=True),
    "long": PlacesConfig(3, 4, 7, ahead=4, changed=True),
    "few": PlacesConfig(1, 8, ahead=4, changed=True),
    "fewest": PlacesConfig(1, 8, ahead=4, groups=2, changed=True),
}


def multiplies_by_places(group: int, per: int) -> bool:
    """Whether `decode_places_kernel` takes words of `per` numbers, `group` of which share a scale, or whole rows: 0."""
    return group % (CHUNK * per) == 0


def places_config(
    row: int, rows: int, layers: int, tokens: int, per: int, itemsize: int, device: Device, group: int = 0
) -> PlacesConfig:
    """For `decode_places_kernel`: `rows` of `row` numbers, of as many `layers` at once, in words of `per` numbers.

    `group` numbers share a scale, or all of a row: 0.

    H200, us of one stage at 16 tokens, rows that share one scale, the best of two to six settings and the next:
    14336 x 1584 int4 10.0, 10.0, fp8 14.7, 16.2; two such layers at once 16.2, 17.0 and 26.4, 28.4; 4096 x 1584 4.5,
    4.6 and 5.8, 6.8; 4096 x 1024 3.5, 3.6 and 4.2, 4.2; 3168 x 4096 6.8, 7.2 and 8.5, 9.5; 1024 x 4096 4.6, 4.6 and
    4.8, 6.6; 1584 x 14336 12.0, 12.3 and 15.2, 16.1. One run, which was the second of its kind. Of settings that are
    as fast alone, the one is taken that lets no program of the next stage in beside it: both stages of 4096 x 4096 in
    int4 8.2 instead of 10.7, of 4096 x 14336 15.5 instead of 17.0.

    In groups of 128, another run, the setting without groups and that of `IN_GROUPS`: 4096 x 1536 4.8, 3.6; 4096 x
    1024 3.3, 2.6; 1536 x 4096 5.4, 4.4; 1024 x 4096 5.2, 3.4. Both stages of 4096 x 4096 8.5, 5.9. A third run, the
    same of both stages of 4096 x 14336 12.8, 12.1, of 14336 x 4096 17.2, 15.5.
    """
    if device == INTERPRETER:
        return PlacesConfig(2, 2, 2)
    if itemsize == 4:
        # products without tensor cores: a tile more takes Triton a minute
        return PlacesConfig(1, 8 // layers)
    if row > 8192:
        stage = "long"
    elif row > 2048:
        stage = "few" if rows <= 16 * device.sms else "first"
    elif layers > 1:
        stage = "gated"
    elif rows > 64 * device.sms:
        stage = "wide"
    else:
        stage = "last" if row > 1024 else "short"
    if group and per == 8 and tokens <= 16 and stage in IN_GROUPS:
        return IN_GROUPS["fewest" if stage == "few" and rows <= 8 * device.sms else stage]
    config = PLACES[stage][2 * (tokens > 16) + (per < 8)]
    return replace(config, parts=config.parts // layers)


def places_rows(tokens: int) -> int:
    """Tokens are columns of a tensor-core tile, of at least 8."""
    return max(8, pow2(tokens))
