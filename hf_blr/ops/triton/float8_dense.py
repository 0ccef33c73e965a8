"""A dense layer in float8: one product."""

from __future__ import annotations

import torch

from hf_blr.ops.rules.device import device_of
from hf_blr.ops.rules.float8 import multiplies_by_cublas
from hf_blr.ops.triton.float8_gemm import Peak, float8_gemm


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype; tensors (w `[N, K]`,) float8, its scale `[N, 1]`."""
    (w,), (w_scale,) = tensors, scales
    tokens, n = x.shape[0], w.shape[0]
    if multiplies_by_cublas(tokens, n, dtype == torch.bfloat16, bool(activation), device_of(x)):
        rows, columns = x_scale[:, None], w_scale.float().view(1, n)
        return torch._scaled_mm(x, w.T, rows, columns, bias, out_dtype=dtype, use_fast_accum=True)
    out = x.new_empty(tokens, n, dtype=dtype)
    if tokens:
        float8_gemm(x[None], w[None], out[None, None], w_scale[None], Peak(), x_scale, bias=bias, activation=activation)
    return out
