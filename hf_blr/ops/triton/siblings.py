"""Layers that share their input: one first stage for all, and one of each other stage for layers of one size.

The factors are those of the single layers; where they lie decides what one launch can do. Those that `hf_blr.fuse`
has packed are read as the factors of one wide layer. Those that lie apart are used one layer after the other.
"""

from __future__ import annotations

import torch

from hf_blr.ops.triton.blast import blast_decode, blast_finish, blast_project
from hf_blr.ops.triton.launch import decodes, fuses_mix, mixes_along_t
from hf_blr.ops.triton.monarch import monarch_decode, monarch_finish


def monarch_siblings_fwd(x, us, vs, biases):
    """x `[T, K]` -> `[T, sum of N]`; each layer has u `[B2, Q, B1*r]`, v `[B1, B2*r, P]` and bias `[N]` or None.

    Layers of one size make one Monarch layer with the output blocks of all. Low-rank is Monarch with one block.
    """
    tokens, (b1, _, p) = x.shape[0], vs[0].shape
    out = x.new_empty(tokens, sum(u.shape[0] * u.shape[1] for u in us))
    if tokens == 0:
        return out
    # low-rank: the same exception from the kernels for few tokens as in `dispatch`
    decoding = decodes(tokens, b1, us[0].shape[0]) and (b1 > 1 or tokens == 1 or us[0].shape[2] <= 1024)
    for part in split(range(len(vs)), vs, dim=1):
        if not decoding:
            v = joined(vs, part, dim=1)
            y = torch.bmm(x.view(tokens, b1, p).transpose(0, 1), v.transpose(1, 2))
        for run in split(part, us, biases):
            u, bias, o = joined(us, run), joined(biases, run), columns(out, us, run)
            if decoding:
                monarch_decode(x, u, joined(vs, run, dim=1), bias, o)
            else:
                monarch_finish(ranks(y, vs, part, run), u, bias, o)
    return out


def blast_siblings_fwd(x, us, ss, vs, biases):
    """x `[T, K]` -> `[T, sum of N]`; each layer has u `[B2, Q, R]`, s `[B2, B1, R]`, v `[B1, R, P]` and bias."""
    tokens, b1, b2 = x.shape[0], vs[0].shape[0], us[0].shape[0]
    out = x.new_empty(tokens, sum(u.shape[0] * u.shape[1] for u in us))
    if tokens == 0:
        return out
    decoding = decodes(tokens, b1, b2)
    fused = any(fuses_mix(b1, *u.shape, tokens) for u in us)
    along_t = mixes_along_t(b1, b2) and not fused and biases[0] is None
    for part in split(range(len(vs)), vs, dim=1):
        if not decoding:
            y = blast_project(x, joined(vs, part, dim=1), along_t)
        for run in split(part, us, ss, biases):
            u, s, bias, o = joined(us, run), joined(ss, run), joined(biases, run), columns(out, us, run)
            if decoding:
                blast_decode(x, u, s, joined(vs, run, dim=1), bias, o)
            else:
                blast_finish(ranks(y, vs, part, run), u, s, bias, o)
    return out


def split(layers: range, *factors, dim=0) -> list[range]:
    """Runs of neighbouring layers whose tensors each make one wider tensor; with `dim` 0 they have one shape."""
    found = []
    for i in layers:
        if found and all(follows(f[i - 1], f[i], dim) for f in factors):
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found


def follows(a, b, dim) -> bool:
    """Whether b goes on where a ends along `dim`, in one buffer."""
    if a is None:
        return b is None
    size = a.shape[dim]
    return (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() == a.storage_offset() + size * a.stride(dim)
        and a.stride() == b.stride()
        # along the first axis whole layers follow each other, along the second rows of them
        and (a.shape == b.shape if dim == 0 else a.shape[2] == b.shape[2])
    )


def joined(tensors, run: range, dim=0):
    """The tensors of a run as one, without a copy; None if there are none."""
    first = tensors[run.start]
    if first is None or len(run) == 1:
        return first
    shape = list(first.shape)
    shape[dim] = sum(tensors[i].shape[dim] for i in run)
    return first.as_strided(shape, first.stride())


def columns(out, us, run: range):
    """The part of out `[T, sum of N]` that belongs to a run."""
    ends = [0]
    for u in us:
        ends.append(ends[-1] + u.shape[0] * u.shape[1])
    return out[:, ends[run.start] : ends[run.stop]]


def ranks(y, vs, part: range, run: range):
    """The part of y `[B1, T, sum of ranks]` that belongs to a run within the part that y was computed for."""
    start = sum(vs[i].shape[1] for i in range(part.start, run.start))
    return y[:, :, start : start + sum(vs[i].shape[1] for i in run)]
