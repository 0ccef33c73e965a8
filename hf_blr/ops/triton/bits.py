"""Weights in bits inside kernels: 32-bit words become numbers in registers, and scales multiply sums.

A column of a matrix is what a program addresses: one number of a plain matrix, one word of a matrix in bits. Words hold
8 numbers of 4 bits or 4 of 8, from the lowest bits on. Integers carry an offset of half their range (`formats.words`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_blr.ops.rules.device import Device
from hf_blr.ops.rules.packed import PER_WORD
from hf_blr.ops.triton.halves import sum_of_two_words, sum_of_word
from hf_blr.ops.triton.pairs import ASSEMBLES, byte_places, int4_places


class Weights(NamedTuple):
    """A factor `[..., n, k]` as kernels read it.

    data: `[..., n, k]`, or in bits `[..., n, words]` int32.
    scale: `[..., n, groups]` bfloat16; None: data holds numbers.
    form: of `PER_WORD`; "plain" without scale.
    length: k.
    """

    data: Tensor
    scale: Tensor | None
    form: str
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.data.shape[:-1], self.length

    @property
    def per(self) -> int:
        """Numbers of a column."""
        return PER_WORD[self.form]

    @property
    def group(self) -> int:
        """Numbers that share a scale, which divide a row; 0: no scale, or one for the row."""
        if self.scale is None or self.scale.shape[-1] == 1:
            return 0
        return self.length // self.scale.shape[-1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of data, in columns, but for the last axis."""
        return self.data.stride()[:-1]

    @property
    def scale_strides(self) -> tuple[int, ...]:
        return (0,) * len(self.strides) if self.scale is None else self.scale.stride()[:-1]

    @property
    def itemsize(self) -> float:
        """Bytes of a number."""
        return self.data.element_size() / self.per

    def form_on(self, device: Device) -> str:
        """The form as kernels of one token unpack it: below compute capability 8.9 nothing converts float8."""
        return "fp8_bits" if self.form == "fp8" and device.capability < (8, 9) else self.form

    def named(self, kernel: str) -> str:
        """The kernel's name among measured settings."""
        return kernel if self.form == "plain" else f"{kernel}_{self.form}_{self.group}"

    def stacked(self) -> Weights:
        """With a leading axis of one block."""
        return self._replace(data=self.data[None], scale=None if self.scale is None else self.scale[None])


def weights_in_bits(codes: Tensor, scale: Tensor, bits: int, length: int) -> Weights:
    """A factor as `ops.bits.InBits` has it, with words of float8 too."""
    if codes.dtype == torch.float8_e4m3fn:
        return Weights(codes.view(torch.int32), scale, "fp8", length)
    return Weights(codes, scale, f"int{bits}", length)


def weights_of(w: Tensor | Weights) -> Weights:
    """A plain factor, or one in bits, as kernels read it."""
    return w if isinstance(w, Weights) else Weights(w, None, "plain", w.shape[-1])


@triton.jit
def number_at(b_w, j: tl.constexpr, FORM: tl.constexpr):
    """Number j of each word, in float32 and without its scale.

    An integer is put into the mantissa of 2^23, which conversion instructions would take four times as long for.
    """
    if FORM == "int4":
        # places 0 to 4 lie within the mantissa as they are
        place: tl.constexpr = j if j < 5 else j - 3
        b_w = b_w if j < 5 else b_w >> 12
        b = ((b_w & (15 << (4 * place))) | 0x4B000000).to(tl.float32, bitcast=True)
        b_n = b * (2.0 ** (-4 * place)) - (2.0 ** (23 - 4 * place) + 8.0)
    elif FORM == "int8":
        place: tl.constexpr = j % 2
        b_w = b_w if j < 2 else b_w >> 16
        b = ((b_w & (255 << (8 * place))) | 0x4B000000).to(tl.float32, bitcast=True)
        b_n = b * (2.0 ** (-8 * place)) - (2.0 ** (23 - 8 * place) + 128.0)
    else:
        # e4m3's exponent, of bias 7, as float32's, of bias 127; subnormal numbers come right too
        b_n = b_w << (24 - 8 * j)
        b = (b_n & -2147483648) | ((b_n >> 4) & 0x07F00000)
        b_n = b.to(tl.float32, bitcast=True) * (2.0**120)
    return b_n


@triton.jit
def places_of(b_w, FORM: tl.constexpr, PER: tl.constexpr, DTYPE: tl.constexpr, CHANGED: tl.constexpr):
    """A tuple of PER tiles like b_w `[BJ, rows, 16]`: number 0, 1, ... of each word, in DTYPE and without scales.

    CHANGED, int4 alone: from the eighth word on those of each pair change places.
    """
    if ASSEMBLES and FORM == "int4" and tl.float32 != DTYPE:
        b_first = tl.zeros(b_w.shape, tl.int32) + 0x5410
        if CHANGED:
            b_first = tl.where(tl.arange(0, 16)[None, None, :] >= 8, 0x1054, b_first)
        tiles = int4_places(b_w, b_first, DTYPE)
    elif ASSEMBLES and tl.float32 != DTYPE:
        tiles = byte_places(b_w, FORM, DTYPE)
    else:
        if CHANGED:
            b_0, b_1 = tl.split(tl.reshape(b_w, (b_w.shape[0], b_w.shape[1], 8, 2)))
            m = tl.arange(0, 8)[None, None, :] >= 4
            b_w = tl.reshape(tl.join(tl.where(m, b_1, b_0), tl.where(m, b_0, b_1)), b_w.shape)
        tiles = ()
        for j in tl.static_range(PER):
            tiles = tiles + (number_at(b_w, j, FORM).to(DTYPE),)
    return tiles


@triton.jit
def numbers_of(b_w, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """The numbers `[..., C * numbers of a word]` of words `[..., C]`, without scales; plain ones as they are."""
    if FORM == "plain":
        b = b_w
    elif FORM == "int4":
        # the axis that a join adds is the fastest: the lowest bit of a number's place comes last
        b_04 = tl.join(number_at(b_w, 0, FORM).to(DTYPE), number_at(b_w, 4, FORM).to(DTYPE))
        b_26 = tl.join(number_at(b_w, 2, FORM).to(DTYPE), number_at(b_w, 6, FORM).to(DTYPE))
        b_15 = tl.join(number_at(b_w, 1, FORM).to(DTYPE), number_at(b_w, 5, FORM).to(DTYPE))
        b_37 = tl.join(number_at(b_w, 3, FORM).to(DTYPE), number_at(b_w, 7, FORM).to(DTYPE))
        b = flattened(tl.join(tl.join(b_04, b_26), tl.join(b_15, b_37)), b_w, 8)
    else:
        b_02 = tl.join(number_at(b_w, 0, FORM).to(DTYPE), number_at(b_w, 2, FORM).to(DTYPE))
        b_13 = tl.join(number_at(b_w, 1, FORM).to(DTYPE), number_at(b_w, 3, FORM).to(DTYPE))
        b = flattened(tl.join(b_02, b_13), b_w, 4)
    return b


@triton.jit
def flattened(b, b_w, PER: tl.constexpr):
    """b with the shape of words, the last axis PER times as long."""
    if len(b_w.shape) == 2:
        b = tl.reshape(b, (b_w.shape[0], b_w.shape[1] * PER))
    else:
        b = tl.reshape(b, (b_w.shape[0], b_w.shape[1], b_w.shape[2] * PER))
    return b


@triton.jit
def by_place(b_x, FORM: tl.constexpr):
    """x `[A, B, C * n]`, n numbers for each word, as n tiles `[A, B, C]`: what meets number 0, 1, ... of a word."""
    A: tl.constexpr = b_x.shape[0]
    B: tl.constexpr = b_x.shape[1]
    if FORM == "plain":
        tiles = (b_x,)
    elif FORM == "int4":
        b_even, b_odd = tl.split(tl.reshape(b_x, (A, B, b_x.shape[2] // 8, 2, 2, 2)))
        b_04, b_26 = tl.split(b_even)
        b_15, b_37 = tl.split(b_odd)
        b_0, b_4 = tl.split(b_04)
        b_1, b_5 = tl.split(b_15)
        b_2, b_6 = tl.split(b_26)
        b_3, b_7 = tl.split(b_37)
        tiles = (b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7)
    else:
        b_even, b_odd = tl.split(tl.reshape(b_x, (A, B, b_x.shape[2] // 4, 2, 2)))
        b_0, b_2 = tl.split(b_even)
        b_1, b_3 = tl.split(b_odd)
        tiles = (b_0, b_1, b_2, b_3)
    return tiles


@triton.jit
def sum_of_columns(
    b_ps,
    b_ws,
    b_cs,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    FORM: tl.constexpr,
    PER: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The sum over COUNT tiles of columns, from b_ws[FIRST] on, of their numbers times those of x, in float32.

    b_ps is what `paired` made of x for these tiles; with SCALED, b_cs has the columns' scales.
    """
    acc = tl.zeros(b_ws[FIRST].shape, tl.float32)
    if FORM == "plain":
        for step in tl.static_range(COUNT):
            acc += b_ps[step].to(tl.float32) * b_ws[FIRST + step].to(tl.float32)
    elif b_ps[0].dtype == tl.int32:
        if SCALED > 0:
            for step in tl.static_range(COUNT):
                acc += sum_of_word(b_ps, step * (PER // 2), b_ws[FIRST + step], FORM) * b_cs[FIRST + step].to(
                    tl.float32
                )
        else:
            for step in tl.static_range(0, COUNT - 1, 2):
                acc += sum_of_two_words(b_ps, step * (PER // 2), b_ws[FIRST + step], b_ws[FIRST + step + 1], FORM)
            if COUNT % 2 == 1:
                acc += sum_of_word(b_ps, (COUNT - 1) * (PER // 2), b_ws[FIRST + COUNT - 1], FORM)
        acc *= b_ps[COUNT * (PER // 2)]
    else:
        for step in tl.static_range(COUNT):
            b = b_ps[step * PER].to(tl.float32) * number_at(b_ws[FIRST + step], 0, FORM)
            for j in tl.static_range(1, PER):
                b += b_ps[step * PER + j].to(tl.float32) * number_at(b_ws[FIRST + step], j, FORM)
            acc += b * b_cs[FIRST + step].to(tl.float32) if SCALED > 0 else b
    return acc


@triton.jit
def step_scale(s_ptr, m, step, R, SCALED: tl.constexpr, BR: tl.constexpr):
    """Scales of the rows at s_ptr in this step of BR numbers, which lie in one group of SCALED; 0: of whole rows."""
    if SCALED > 0:
        # behind the last step nothing is used
        s_ptr += tl.minimum(step * BR, R - 1) // SCALED
    return tl.load(s_ptr, mask=m, other=0.0)
