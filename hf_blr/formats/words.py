"""Integers of a few bits in 32-bit words, without gaps: the layout of compressed-tensors' `pack-quantized`.

Of each row, number i takes the bits from b*i on of the row's words, counted from the lowest bit of the first word; the
bits that are left over in the last word are zero. With 2, 4 or 8 bits no number crosses two words; with 3, 32 numbers
fill three words.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 32


def words_for(count: int, bits: int) -> int:
    """Words that so many numbers take."""
    return -(-count * bits // WORD)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., k]`, integers in [-2^(bits-1), 2^(bits-1)), as `[..., words]` int32."""
    count = codes.shape[-1]
    period, width = period_of(bits)
    # int64, so that no shift reaches a sign
    unsigned = codes.long() + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -count % period)).unflatten(-1, (-1, period))
    words = unsigned.new_zeros(*unsigned.shape[:-1], width)
    for i in range(period):
        word, shift = divmod(i * bits, WORD)
        shifted = unsigned[..., i] << shift
        words[..., word] |= shifted & 0xFFFFFFFF
        if shift + bits > WORD:
            words[..., word + 1] |= shifted >> WORD
    words = words.flatten(-2)[..., : words_for(count, bits)]
    # the upper half of the unsigned words are the negative signed ones
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).int().contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: `[..., words]` int32 as `[..., count]` int8."""
    period, width = period_of(bits)
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % width)).unflatten(-1, (-1, width))
    places = [divmod(i * bits, WORD) for i in range(period)]
    if width == 1:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
        # the sign that a shift brings along is masked out
        unsigned = (words >> shifts) & mask
    else:
        unsigned = torch.stack([crossing(words, *place, bits) for place in places], dim=-1)
    return (unsigned - half).to(torch.int8).flatten(-2)[..., :count]


def crossing(words: Tensor, word: int, shift: int, bits: int) -> Tensor:
    """The numbers at this place of each period `[..., width]`, which may go on in the next word."""
    low = min(bits, WORD - shift)
    part = (words[..., word] >> shift) & ((1 << low) - 1)
    if low == bits:
        return part
    return part | ((words[..., word + 1] & ((1 << (bits - low)) - 1)) << low)


def leftover_is_zero(words: Tensor, bits: int, count: int) -> bool:
    """Whether the bits behind the last of `count` numbers are zero in every row."""
    used = count * bits % WORD
    return not used or not bool(((words[..., -1].long() & 0xFFFFFFFF) >> used).any())


def period_of(bits: int) -> tuple[int, int]:
    """(numbers, words) after which numbers begin at the first bit of a word again."""
    both = math.lcm(bits, WORD)
    return both // bits, both // WORD
