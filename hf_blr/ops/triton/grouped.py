"""What kernels of grouped projections share: layers on one input, with one first stage for all of them.

The factors are those of the single layers; where they lie decides what one launch can do. Those that `hf_blr.fuse`
has packed are read as the factors of one wide layer. Those that lie apart are used one layer after the other.
"""

from __future__ import annotations

from hf_blr.ops.activations import activated
from hf_blr.ops.triton.bits import Weights
from hf_blr.ops.triton.decode_one import expand_one
from hf_blr.ops.triton.decode_places import by_places, expand_by_places


def gates(u, tokens):
    """Whether two layers have one last stage, with the product of their outputs."""
    return tokens == 1 or by_places(u)


def finish_gated(z, u, bias, activation):
    """`[T, N]` of two layers whose u lie in one `[2*B2, Q, R]`, where these are `gates`."""
    out = z.new_empty(z.shape[1], u.shape[0] // 2 * u.shape[1])
    expand = expand_one if len(out) == 1 else expand_by_places
    expand(z, u, bias, out, activation, gated=True)
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
    if isinstance(a, Weights):
        alike = (a.form, a.length, a.group) == (b.form, b.length, b.group)
        return alike and follows(a.data, b.data, axis) and follows(a.scale, b.scale, axis)
    return (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() == a.storage_offset() + a.shape[axis] * a.stride(axis)
        # a stack of one matrix has any stride between matrices
        and all(m == n or size == 1 for m, n, size in zip(a.stride(), b.stride(), a.shape, strict=True))
        and all(m == n for i, (m, n) in enumerate(zip(a.shape, b.shape, strict=True)) if i != axis or axis == 0)
    )


def joined(tensors, run: range, axis):
    """The tensors of a run as one, without a copy; None if there are none."""
    first = tensors[run.start]
    if first is None or len(run) == 1:
        return first
    if isinstance(first, Weights):
        data, scale = joined([t.data for t in tensors], run, axis), joined([t.scale for t in tensors], run, axis)
        return first._replace(data=data, scale=scale)
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
