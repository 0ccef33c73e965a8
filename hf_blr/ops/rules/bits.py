"""Layers whose factors are kept in bits: whether kernels read codes and scales, and which."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.ops.rules.packed import reads_packed
from hf_blr.structures.spec import FACTOR, BLRSpec

#: the ways of a layer in bits. numbers: factors in x's dtype, multiplied as plain ones are. float8: x, y and z are cast
#: to e4m3, and products are of float8. packed: kernels for few tokens that read codes and scales and multiply in x's
#: dtype
NUMBERS, FLOAT8, PACKED = "numbers", "float8", "packed"
#: what tensor descriptors and float8 products take rows in, in bytes
ALIGNED = 16
#: block pairs up to which products in float8 pay. 4096 x 4096, half kept, 1024 tokens, H200, us: Monarch 4x4 30, 16x16
#: 50: products are small, and y and z many. Dense in bfloat16 takes 47
MOST_PAIRS = 64
#: ... of structures that mix between the products, whose pairs have no products of their own; and input blocks
MOST_MIXED, MOST_MIXED_INPUTS = 256, 64
#: compute capability from which tensor cores multiply float8_e4m3fn
LEAST_FLOAT8 = (8, 9)


@dataclass(frozen=True)
class CodeForm:
    """In what form a layer keeps its factors.

    Args:
        bits: of a code.
        group_size: numbers of a row that share a scale; None: the whole row.
        float8: codes are float8_e4m3fn; else integers in 32-bit words.
    """

    bits: int
    group_size: int | None = None
    float8: bool = False


def route(spec: BLRSpec, tokens: int, form: CodeForm, float8: bool, packed: bool) -> str:
    """What a layer in bits runs on a card that has all that it takes: `NUMBERS`, `FLOAT8` or `PACKED`.

    Args:
        spec: the layer's sizes.
        tokens: T.
        form: of its factors.
        float8, packed: whether its structure has these kernels.
    """
    if packed and tokens <= FEW_TOKENS and reads_packed(spec, form):
        return PACKED
    if math.prod(spec.num_blocks) > (MOST_MIXED if spec.elementwise else MOST_PAIRS):
        return NUMBERS
    if spec.elementwise and spec.num_blocks[0] > MOST_MIXED_INPUTS:
        return NUMBERS
    lengths = [shape[-1] for name, shape in spec.shapes(FACTOR).items() if name not in spec.elementwise]
    if float8 and form.float8 and not any(length % ALIGNED for length in lengths):
        return FLOAT8
    return NUMBERS


def missing(found: str, capability: tuple[int, int] | None) -> str | None:
    """What a card lacks for a route, in words; None if nothing. The interpreter, of no capability, has everything."""
    if found == FLOAT8 and capability is not None and capability < LEAST_FLOAT8:
        return "products in float8 need compute capability {}.{}, the GPU has {}.{}".format(*LEAST_FLOAT8, *capability)
    return None
