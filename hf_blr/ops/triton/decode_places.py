"""2 to 32 tokens on weights in bits, multiplied place by place: all stages but the first of BLAST.

`places_kernel.py` says how it multiplies. Here is which factors it takes, and how a stage of them is launched.
"""

from __future__ import annotations

import torch
import triton

from hf_blr.ops.rules.device import device_of, dot_precision, vector_width
from hf_blr.ops.rules.few_tokens import lines
from hf_blr.ops.rules.packed import (
    CHUNK,
    MOST_STEPS,
    PlacesConfig,
    multiplies_by_places,
    places_config,
    places_rows,
)
from hf_blr.ops.triton.bits import Weights
from hf_blr.ops.triton.places_kernel import decode_places_kernel
from hf_blr.ops.triton.places_out import sum_splits
from hf_blr.ops.triton.tuned import launch


def by_places(w) -> bool:
    """Whether a factor is multiplied so: one in bits whose words, sixteen at a time, lie in one group."""
    return isinstance(w, Weights) and w.form != "plain" and multiplies_by_places(w.group, w.per)


def project_by_places(x, v: Weights, z, add=False):
    """Stage one of Monarch and low-rank as `decode_project.decode_project`."""
    b1, rows, p = v.shape
    strides = p, 0, 0, x.stride(0)
    multiply(x, v, None, z, b1, rows // len(z), strides, z.stride()[:2], add=add)


def expand_by_places(z, u: Weights, bias, out, activation="", gated=False):
    """Stage two as `decode_expand.decode_expand`; `gated` as of `decode_one.expand_one`, of any number of tokens."""
    blocks, q, r = u.shape
    blocks //= 1 + gated
    apart = r if len(z) == blocks else blocks * z.stride(0)
    strides = z.stride(0), r, apart, z.stride(1)
    multiply(z, u, bias, out, len(z), q, strides, (0, out.stride(0)), activation, gated)


def multiply(x, w: Weights, bias, out, x_blocks, group, strides, out_strides, activation="", gated=False, add=False):
    """Launch the kernel: `strides` of x are from block to block, layer to layer, to the gated layer, token to token."""
    all_blocks, q, r = w.shape
    device, tokens = device_of(x), out.shape[-2]
    layers = 1 + gated
    columns = w.data.shape[-1]
    vec, vec_w = vector_width(r, *strides), vector_width(columns, *w.strides)

    def run(config: PlacesConfig):
        # what a last stage does to its sums cannot wait for others
        splits = config.splits if out.dim() == 3 else 1
        part = triton.cdiv(columns, config.parts * splits * CHUNK) * CHUNK
        parts = config.parts * layers
        rows = 16 * config.tiles
        steps = part // CHUNK
        # of more steps a loop
        laid_out = config.ahead > 0 and steps <= MOST_STEPS
        groups = min(config.groups, places_rows(tokens) // 8)
        # in float32, to be added by one kernel more
        sums = out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)
        decode_places_kernel[(triton.cdiv(q, rows), all_blocks // layers, splits * groups)](
            x,
            w.data,
            w.scale,
            bias,
            sums,
            tokens,
            q,
            group,
            x_blocks,
            all_blocks // layers,
            sums.stride(0) if splits > 1 else 0,
            *(out_strides if splits == 1 else sums.stride()[1:3]),
            part,
            *(n // vec for n in (r, *strides)),
            *(n // vec_w for n in (columns, *w.strides)),
            *w.scale_strides,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            GATED=gated,
            ADD=add and splits == 1,
            LINES=lines(part, 128 // w.per),
            LINE=128 // w.per,
            FORM=w.form,
            PER=w.per,
            SCALED=w.group,
            PDL=device.has_pdl,
            PRECISION=dot_precision(x.dtype),
            VEC=vec,
            VEC_W=vec_w,
            V=min(4, vec_w),
            BJ=parts,
            BT=places_rows(tokens) // groups,
            TILES=config.tiles,
            SPLITS=splits,
            GROUPS=groups,
            CHANGED=config.changed and w.form == "int4" and vec_w >= 4,
            STEPS=steps if laid_out else 0,
            AHEAD=min(config.ahead, steps) if laid_out else 1,
            # a warp has a part
            num_warps=parts,
            # nothing goes through shared memory
            num_stages=1,
            **device.launch_options,
        )
        if splits > 1:
            sum_splits(sums, out, add)

    rule = places_config(r, all_blocks * q, layers, tokens, w.per, x.element_size(), device, w.group)
    launch(run, w.named("decode_places"), rule, tokens, (r, q, all_blocks, gated), x)
