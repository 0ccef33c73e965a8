"""Low-rank and pivoted layers: who multiplies."""

from __future__ import annotations

from hf_blr.ops.rules.few_tokens import FEW_TOKENS, runs_decode_kernels


def kernels_pay(tokens: int) -> bool:
    """Whether the decode kernels multiply a low-rank or pivoted layer faster than cuBLAS.

    Low-rank is two plain matrix products, which cuBLAS does best at many tokens. Pivoted layers are the same two
    products behind a gather of the inputs, for which there is a kernel; inside their op this rule decides who
    multiplies. 4096 x 4096, H100, us of both at 16 tokens: rank 1024 9.3 and 14.4, rank 1632 14.3 and 18.5.
    """
    return tokens <= FEW_TOKENS // 2


def runs_few(tokens: int, activates: bool = False, keep: bool = False) -> bool:
    """Whether a low-rank layer that was handed to the kernels runs those for few tokens.

    One that activates is handed to them at any number of tokens.
    """
    return not keep and (kernels_pay(tokens) if activates else runs_decode_kernels(tokens, 1, 1))
