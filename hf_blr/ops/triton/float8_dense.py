"""A dense layer in float8: one product."""

from __future__ import annotations

from hf_blr.ops.triton.float8_gemm import Peak, float8_gemm


def forward(x, x_scale, tensors, scales, bias, dtype, activation):
    """x `[T, K]` float8 with x_scale `[T]` -> `[T, N]` in dtype; tensors (w `[N, K]`,) float8, its scale `[N, 1]`."""
    (w,), (w_scale,) = tensors, scales
    out = x.new_empty(x.shape[0], w.shape[0], dtype=dtype)
    if x.shape[0]:
        float8_gemm(x[None], w[None], out[None, None], w_scale, Peak(), x_scale, bias=bias, activation=activation)
    return out
