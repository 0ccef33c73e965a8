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
    unsigned = codes.int() + (1 << (bits - 1))
    unsigned = torch.nn.functional.pad(unsigned, (0, -count % period)).unflatten(-1, (-1, period))
    words = []
    for word in range(width):
        # of the numbers with bits in this word, the first may have begun in the word before
        first, end = word * WORD // bits, -(-(word + 1) * WORD // bits)
        shifts = torch.arange(first * bits, end * bits, bits, dtype=torch.int32, device=codes.device) - word * WORD
        numbers = unsigned[..., first:end] << shifts.clamp_min(0) >> (-shifts).clamp_min(0)
        # no bit comes twice: the sum is what they are together, a sign included
        words.append(numbers.sum(-1, dtype=torch.int32))
    return torch.stack(words, -1).flatten(-2)[..., : words_for(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: `[..., words]` int32 as `[..., count]` int8."""
    _, width = period_of(bits)
    mask, half = (1 << bits) - 1, 1 << (bits - 1)
    words = torch.nn.functional.pad(words, (0, -words.shape[-1] % width)).unflatten(-1, (-1, width))
    numbers = []
    for word in range(width):
        # of the numbers that begin in this word, the last may go on in the next
        first, end = -(-word * WORD // bits), -(-(word + 1) * WORD // bits)
        shifts = torch.arange(first * bits, end * bits, bits, dtype=torch.int32, device=words.device) - word * WORD
        # the sign that a shift brings along is masked out
        found = (words[..., word : word + 1] >> shifts) & mask
        beyond = end * bits - (word + 1) * WORD
        if beyond > 0:
            found[..., -1] &= mask >> beyond
            found[..., -1] |= (words[..., word + 1] << (bits - beyond)) & mask
        numbers.append(found)
    return (torch.cat(numbers, -1) - half).to(torch.int8).flatten(-2)[..., :count]


def leftover_is_zero(words: Tensor, bits: int, count: int) -> bool:
    """Whether the bits behind the last of `count` numbers are zero in every row."""
    used = count * bits % WORD
    return not used or not bool(((words[..., -1].long() & 0xFFFFFFFF) >> used).any())


def period_of(bits: int) -> tuple[int, int]:
    """(numbers, words) after which numbers begin at the first bit of a word again."""
    both = math.lcm(bits, WORD)
    return both // bits, both // WORD
