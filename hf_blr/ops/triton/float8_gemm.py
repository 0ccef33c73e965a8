"""A stack of products of float8, whose results are scaled, and cast again, while they are stored.

The first stage of a layer stores float8. By Cauchy-Schwarz no result exceeds the norm of a token times that of a row of
weights, which is bounded by its scale: no pass over the results is needed to find how large they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from hf_blr.ops.cast import LARGEST
from hf_blr.ops.rules.device import device_of, pow2
from hf_blr.ops.rules.float8 import float8_config
from hf_blr.ops.triton.block_gemm import descriptor, fits_tma
from hf_blr.ops.triton.float8_tiles import float8_gemm_kernel
from hf_blr.ops.triton.tuned import launch

#: as much longer can rounding to e4m3 make a vector
LONGER = 1 + 2**-4
#: numbers of float8 in a line of the caches
LINE = 128


class Peak(NamedTuple):
    """What no result of a first stage exceeds, relative to the norm of a token.

    In output block i it is sqrt((bound * max of peaks[:, i])^2 + extra^2); without peaks it is bound.
    """

    bound: float = 1.0
    #: `[J, B2, R]`, contiguous but for gaps between its J
    peaks: torch.Tensor | None = None
    extra: float = 0.0


def peak_of_codes(length, scale=None, extra=0.0):
    """Of products with rows of `length` codes, of which none exceeds the largest, and their scale `[J, B2, R]`."""
    return Peak(LONGER * LARGEST * math.sqrt(length), scale, extra)


class EmittedScales(NamedTuple):
    """What the first stage also stores for a last one by cuBLAS, which takes scales in float32: no kernel more.

    rows `[T]` is x_scale times the peak, columns `[N]` is last_scale `[N]` of the last stage's weights.
    """

    x_scale: torch.Tensor
    last_scale: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


def in_lines(like, *shape):
    """An empty tensor like `like` whose rows begin at lines of 128 bytes, so that no tile's row lies in one more."""
    *outer, length = shape
    return like.new_empty(*outer, -(-length // LINE) * LINE)[..., :length]


def float8_gemm(
    a, b, c, b_scale, peak, x_scale=None, pivots=None, bias=None, activation="", emitted=None, beside=False
):
    """c[j, i] = a[..] b[j * I + i]^T, scaled, into the strided view c `[J, I, T, N]`.

    Args:
        a: `[G, T, K]` float8; of as many matrices as c, or one for each j.
        b: `[G, M, K]` float8, whose M rows are those of one matrix `[N, K]` or of several, J * I in all.
        c: float8 of a first stage; any dtype of a last one.
        b_scale: `[G, M, 1]`, contiguous but for gaps between its G, or None.
        peak: of the first stage, which divides by it, and of the last, which multiplies by it.
        x_scale: `[T]` of the last stage; None: this is the first.
        pivots: `[T, N]` float8, added to the results of the first stage.
        bias: `[I * N]`, or None.
        emitted: `EmittedScales` of a first stage with one c, or None.
        beside: the next kernel needs nothing of this one, and may start beside it if it ends by `end_after_previous`.
    """
    (j, i, tokens, n), k = c.shape, b.shape[2]
    device = device_of(c)
    peaks, stride_peaks = (1, 1, 1), 0
    if peak.peaks is not None:
        peaks, stride_peaks = peak.peaks.shape, peak.peaks.stride(0)
    first = x_scale is None
    emits = emitted or (x_scale, None, None, None)

    def run(config):
        tma = device.has_tma and fits_tma(a) and fits_tma(b)
        tiles = triton.cdiv(n, config.outputs) * triton.cdiv(tokens, config.bt) * j * i
        float8_gemm_kernel[(min(tiles, config.stays * device.sms) if config.stays else tiles,)](
            descriptor(a, config.bt, config.bk) if tma else a,
            descriptor(b, config.bn, config.bk) if tma else b,
            descriptor(b, config.beside, config.bk) if tma and config.beside else b,
            c,
            b_scale,
            emits[0],
            peak.peaks,
            pivots,
            bias,
            *emits[1:],
            tokens,
            n,
            k,
            j * i,
            0 if emitted is None else emitted.columns.numel(),
            i,
            peaks[0],
            peaks[2],
            j * i // a.shape[0],
            j * i // b.shape[0],
            *a.stride()[:2],
            *b.stride()[:2],
            0 if b_scale is None else b_scale.stride(0),
            *c.stride(),
            0 if pivots is None else pivots.stride(0),
            stride_peaks,
            peak.bound,
            peak.extra,
            FIRST=first,
            SCALED=b_scale is not None,
            PEAKS=peak.peaks is not None,
            PIVOTS=pivots is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            EMITS=emitted is not None,
            TMA=tma,
            PDL=beside and device.has_pdl,
            STAYS=config.stays > 0,
            BI=pow2(i),
            BS=min(2048, pow2(peaks[0] * peaks[2])),
            BT=config.bt,
            BN=config.bn,
            BESIDE=config.beside,
            BK=config.bk,
            num_warps=config.warps,
            num_stages=config.stages,
        )

    rule = float8_config(tokens, n, k, j * i, device)
    launch(run, "float8_gemm", rule, tokens, (j * i, n, k, first, bool(activation)), c)
