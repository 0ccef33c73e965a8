"""Layers in float8 for tests: the arithmetic of their kernels in plain PyTorch, an interpreter that rounds right."""

import math

import numpy as np
import torch

from hf_blr.formats import FORMATS
from hf_blr.linear import BLRLinear
from hf_blr.ops.activations import activated
from hf_blr.ops.cast import LARGEST, plain_cast
from hf_blr.structures import structure_named

FLOAT8 = torch.float8_e4m3fn
LONGER = 1 + 2**-4
#: {structure: (blocks, rank)} of sizes that the kernels take
SIZES = {
    "low_rank": ((1, 1), 32),
    "pivoted": ((1, 1), 32),
    "monarch": ((4, 2), 16),
    "blast": ((2, 4), 48),
    "dense": ((1, 1), 64),
}
#: of one rounding to e4m3, relative, of many numbers: half a step is 2^-4 of the smallest number of a binade
ONE_ROUNDING = 0.028
#: how often numbers are rounded to float8 on the way: x, y, z
ROUNDINGS = {"low_rank": 2, "pivoted": 3, "monarch": 2, "blast": 3, "dense": 1}


def layer(structure, k=128, n=64, bias=True, dtype=torch.float32, seed=0):
    """A module in fp8 whose outputs are of order one."""
    torch.manual_seed(seed)
    blocks, rank = SIZES[structure]
    spec = structure_named(structure).spec(k, n, rank, blocks)
    module = BLRLinear.from_spec(spec, bias=bias, dtype=dtype, storage=FORMATS["fp8"]).eval()
    if structure == "pivoted":
        module.order.copy_(torch.randperm(k))
    if bias:
        torch.nn.init.normal_(module.bias)
    return module


def exact(module, x):
    """In float64, with the numbers that the codes stand for."""
    bias = None if module.bias is None else module.bias.double()
    out = torch.nn.functional.linear(x.double(), module.dense_weight(torch.float64), bias)
    return activated(out, module.activation)


def relative(out, wanted):
    return ((out.double() - wanted).norm() / wanted.norm()).item()


def rounded(t):
    return t.to(FLOAT8).double()


def reference(module, x):
    """What the kernels compute, roundings included, with sums in float64."""
    spec, parts = module.spec, {name: part() for name, part in module.named_children()}
    codes = {name: part.codes.double() for name, part in parts.items()}
    scales = {name: part.scale.double() for name, part in parts.items()}
    rows, x_scale = plain_cast(x.reshape(-1, x.shape[-1]))
    rows, x_scale = rows.double(), x_scale.double()
    (b1, b2), (p, _) = spec.num_blocks, spec.block_shape
    if spec.structure == "dense":
        out = rows @ (codes["w"] * scales["w"]).T * x_scale[:, None]
    elif spec.structure == "pivoted":
        rows = rows[:, module.order.long()]
        pivots, rest = rows[:, : spec.rank], rows[:, spec.rank :]
        peak = (bound(rest.shape[1]) * scales["c"].max()).square().add(LONGER**2).sqrt()
        y = rounded((rest @ (codes["c"] * scales["c"]).T + pivots) / peak)
        out = y @ (codes["u"] * scales["u"]).T * peak * x_scale[:, None]
    elif spec.structure == "blast":
        y = rounded(torch.einsum("tjp,jrp->jtr", rows.view(-1, b1, p), codes["v"]) / bound(p))
        weights = module.s.double() * scales["v"][..., 0]
        peak = LONGER * weights.square().sum(1).sqrt().amax(-1)[:, None, None]
        z, weights = 0, (weights / peak).half().double()
        for j in range(b1):
            # two numbers an instruction
            z = (weights[:, j, None] * y[j] + z).half().double()
        z = rounded(z)
        out = torch.einsum("itr,iqr->tiq", z * peak * bound(p), codes["u"] * scales["u"]).flatten(1)
        out = out * x_scale[:, None]
    else:
        u, v = (codes[n].view(b, -1, codes[n].shape[-1]) for n, b in (("u", b2), ("v", b1)))
        u_scale, v_scale = scales["u"].view(b2, -1, 1), scales["v"].view(b1, b2, -1)
        peak = bound(p) * v_scale.amax((0, 2))
        y = torch.einsum("tjp,jirp->tjir", rows.view(-1, b1, p), v.view(b1, b2, -1, p)) * v_scale
        z = rounded(y / peak[:, None]).permute(2, 0, 1, 3).flatten(2)
        out = torch.einsum("itr,iqr->tiq", z * peak[:, None, None], u * u_scale).flatten(1) * x_scale[:, None]
    out = out if module.bias is None else out + module.bias.double()
    return activated(out, module.activation).view(*x.shape[:-1], -1)


def bound(length):
    return LONGER * LARGEST * math.sqrt(length)


def patch_rounding(monkeypatch):
    """Let the interpreter round numbers to float8 to the nearest, as GPUs do; it drops the bits by itself.

    Nothing may come that e4m3 has no number for.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        kinds = {tl.float32: np.float32, tl.float16: np.float16}
        if source not in kinds or target != tl.float8e4nv:
            return convert(values, source, target, mode)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(kinds[source]).astype(np.float32))
        # up to half a step beyond the largest rounds to it
        assert not (wide.abs() > LARGEST + 16).any()
        return wide.clamp(-LARGEST, LARGEST).to(FLOAT8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
