"""Layers that share their input: one first stage for all, and one of each other stage for layers of one size.

The factors are those of the single layers; where they lie decides what one launch can do. Those that `hf_blr.fuse`
has packed are read as the factors of one wide layer. Those that lie apart are used one layer after the other.
"""

from __future__ import annotations

import torch

from hf_blr.ops.activations import activated
from hf_blr.ops.dispatch import decodes_low_rank
from hf_blr.ops.triton.blast import blast_decode, blast_finish, blast_project
from hf_blr.ops.triton.decode_expand import decode_expand
from hf_blr.ops.triton.decode_launch import decodes
from hf_blr.ops.triton.decode_one import expand_one
from hf_blr.ops.triton.launch import fuses_mix, mixes_along_t
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
    decoding = decodes(tokens, b1, us[0].shape[0]) and (b1 > 1 or decodes_low_rank(tokens))
    for part in split(range(len(vs)), (vs, 1)):
        v = joined(vs, part, 1)
        if not decoding:
            y = torch.bmm(x.view(tokens, b1, p).transpose(0, 1), v.transpose(1, 2))
        elif b1 == 1:
            z = monarch_decode(x, v, 1)
        for run in split(part, (us, 0), (biases, 0)):
            u, bias, o = joined(us, run, 0), joined(biases, run, 0), columns(out, us, run)
            if not decoding:
                monarch_finish(ranks(y, vs, part, run), u, bias, o)
            elif b1 == 1:
                decode_expand(ranks(z, vs, part, run), u, bias, o)
            else:
                decode_expand(monarch_decode(x, joined(vs, run, 1), u.shape[0]), u, bias, o)
    return out


def blast_siblings_fwd(x, us, ss, vs, biases):
    """x `[T, K]` -> `[T, sum of N]`; each layer has u `[B2, Q, R]`, s `[B2, B1, R]`, v `[B1, R, P]` and bias."""
    tokens, b1, b2 = x.shape[0], vs[0].shape[0], us[0].shape[0]
    out = x.new_empty(tokens, sum(u.shape[0] * u.shape[1] for u in us))
    if tokens == 0:
        return out
    decoding = decodes(tokens, b1, b2)
    fused = [not decoding and fuses_mix(b1, *u.shape, tokens) for u in us]
    along_t = mixes_along_t(b1, b2) and biases[0] is None
    # those that mix inside the last stage want y along the ranks: they have a first stage of their own
    for part in split(range(len(vs)), (vs, 1), (ss, 2), same=fused):
        v = joined(vs, part, 1)
        if decoding:
            z = blast_decode(x, joined(ss, part, 2), v)
        else:
            y = blast_project(x, v, along_t and not fused[part.start])
        for run in split(part, (us, 0), (biases, 0)):
            u, bias, o = joined(us, run, 0), joined(biases, run, 0), columns(out, us, run)
            if decoding:
                decode_expand(ranks(z, vs, part, run), u, bias, o)
            else:
                blast_finish(ranks(y, vs, part, run), u, joined(ss, run, 2), bias, o)
    return out


def monarch_gated_fwd(x, us, vs, biases, activation):
    """One token x `[1, K]` -> activation(first) * second `[1, N]`, of two layers as in `monarch_siblings_fwd`."""
    both, b1, b2 = range(2), vs[0].shape[0], us[0].shape[0]
    if not decodes(1, b1, b2) or split(both, (us, 0), (vs, 1), (biases, 0)) != [both]:
        return multiplied(monarch_siblings_fwd(x, us, vs, biases), activation)
    u = joined(us, both, 0)
    z = monarch_decode(x, joined(vs, both, 1), 1 if b1 == 1 else len(u))
    return finish_gated(z, u, joined(biases, both, 0), activation)


def blast_gated_fwd(x, us, ss, vs, biases, activation):
    """One token x `[1, K]` -> activation(first) * second `[1, N]`, of two layers as in `blast_siblings_fwd`."""
    both, b1, b2 = range(2), vs[0].shape[0], us[0].shape[0]
    if not decodes(1, b1, b2) or split(both, (us, 0), (ss, 2), (vs, 1), (biases, 0)) != [both]:
        return multiplied(blast_siblings_fwd(x, us, ss, vs, biases), activation)
    z = blast_decode(x, joined(ss, both, 2), joined(vs, both, 1))
    return finish_gated(z, joined(us, both, 0), joined(biases, both, 0), activation)


def finish_gated(z, u, bias, activation):
    """`[1, N]` of two layers whose u lie in one `[2*B2, Q, R]`."""
    out = z.new_empty(1, u.shape[0] // 2 * u.shape[1])
    expand_one(z, u, bias, out, activation, gated=True)
    return out


def multiplied(out, activation):
    """activation(first half) * second half of `[T, 2*N]`."""
    gate, up = out.chunk(2, dim=1)
    return activated(up, activation, gate)


def split(layers: range, *factors: tuple, same=None) -> list[range]:
    """Runs of neighbouring layers whose (tensors, axis) each make one tensor that is longer along that axis.

    `same`, if given, holds something for each layer that must not change within a run.
    """
    found = []
    for i in layers:
        joins = found and (same is None or same[i] == same[i - 1])
        if joins and all(follows(f[i - 1], f[i], axis) for f, axis in factors):
            found[-1] = range(found[-1].start, i + 1)
        else:
            found.append(range(i, i + 1))
    return found


def follows(a, b, axis) -> bool:
    """Whether b goes on where a ends along the axis, in one buffer; along the first, b must be as long as a."""
    if a is None:
        return b is None
    return (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() == a.storage_offset() + a.shape[axis] * a.stride(axis)
        and a.stride() == b.stride()
        and all(m == n for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if i != axis or axis == 0)
    )


def joined(tensors, run: range, axis):
    """The tensors of a run as one, without a copy; None if there are none."""
    first = tensors[run.start]
    if first is None or len(run) == 1:
        return first
    shape = list(first.shape)
    shape[axis] = sum(tensors[i].shape[axis] for i in run)
    return first.as_strided(shape, first.stride())


def columns(out, us, run: range):
    """The part of out `[T, sum of N]` that belongs to a run."""
    ends = [0]
    for u in us:
        ends.append(ends[-1] + u.shape[0] * u.shape[1])
    return out[:, ends[run.start] : ends[run.stop]]


def ranks(y, vs, part: range, run: range):
    """The part of y or z `[blocks, T, sum of ranks]` of a run within the part that it was computed for."""
    start = sum(vs[i].shape[1] for i in range(part.start, run.start))
    return y[:, :, start : start + sum(vs[i].shape[1] for i in run)]
