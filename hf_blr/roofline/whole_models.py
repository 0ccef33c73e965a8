"""Arithmetic and traffic of a whole model's forward or decoding step: projections, attention and what is between.

Kernels are those of a block under torch.compile in a CUDA graph: products, attention, and one elementwise kernel for
each norm with the residual sum before it, for the rotary embedding, and for the activation. What the host takes is not
in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hf_blr.ops.rules.device import H100, Device
from hf_blr.roofline.devices import Peaks
from hf_blr.roofline.stage import Stage, in_bytes
from hf_blr.roofline.stages import stages
from hf_blr.structures import BLRSpec, LowRank

#: kernels between a decoding block's projections that torch.compile merges into others: halves of the rotary embedding,
#: positions in the cache and its writes, the mask in the form that attention takes, residual sums
EAGER_KERNELS = 22


@dataclass(frozen=True)
class Projection:
    """One layer: its sizes, the form of `stages` ("dense", "hf_blr" or "float8"), and `adds` as there."""

    spec: BLRSpec
    form: str = "hf_blr"
    adds: bool = False


@dataclass(frozen=True)
class ModelSizes:
    """What a transformer of equal blocks consists of.

    Args:
        groups: one block's projections; those of one group run together (`hf_blr.fuse`).
        blocks: how many.
        hidden: width of the residual stream.
        heads, kv_heads, head_dim: of attention.
        activation: numbers that the MLP's activation reads for each token, and those that it writes.
        fused_activation: whether the projection before it applies it (`hf_blr.fuse`); of a gated MLP at one token.
        norms: in one block, and after the last.
        rotary: whether positions are rotations of queries and keys.
        causal: whether a token attends to those before it alone.
        head: K and N of the output layer, which sees one token of each sequence.
        patches: K and N of the product that makes tokens of a picture; None for text, whose embeddings are looked up.
        own_attention: whether one query attends by our kernel (`hf_blr.fuse`).
    """

    groups: tuple[tuple[Projection, ...], ...]
    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: tuple[int, int]
    norms: tuple[int, int]
    rotary: bool
    causal: bool
    head: tuple[int, int]
    patches: tuple[int, int] | None = None
    fused_activation: bool = False
    own_attention: bool = False


def forward_seconds(sizes: ModelSizes, batch: int, tokens: int, device: Peaks, itemsize: int = 2) -> float:
    """Seconds of a forward over `[batch, tokens]` that keeps no cache, with the output of one token of each."""
    return sum(forward_parts(sizes, batch, tokens, device, itemsize).values())


def forward_parts(sizes: ModelSizes, batch: int, tokens: int, device: Peaks, itemsize: int = 2) -> dict[str, float]:
    """`forward_seconds` by "projections", "attention" and "elementwise" of all blocks, and what runs "once"."""
    pairs = tokens * tokens // (2 if sizes.causal else 1)
    read = batch * tokens * (2 * sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    scores = batch * sizes.heads * pairs
    attention = Stage("attention", 4 * scores * sizes.head_dim, read, scores=scores)
    return seconds_by_part(sizes, batch, tokens, attention, device, itemsize)


def step_seconds(
    sizes: ModelSizes, batch: int, cache: int, device: Peaks, one_block: bool = True, itemsize: int = 2
) -> float:
    """Seconds of one decoding step, the sum of `step_parts`.

    Args:
        cache: tokens that fit into the static cache: attention reads all of it, whatever is masked.
        one_block: whether whole blocks are compiled, or only norms and MLPs.
    """
    return sum(step_parts(sizes, batch, cache, device, one_block, itemsize).values())


def step_parts(
    sizes: ModelSizes, batch: int, cache: int, device: Peaks, one_block: bool = True, itemsize: int = 2
) -> dict[str, float]:
    """`step_seconds` by the parts of `forward_parts`."""
    read = 2 * batch * cache * sizes.kv_heads * sizes.head_dim
    # values go into the cache by a kernel of their own; keys by that of their rotation, or by one more without any
    others = (1 if sizes.rotary else 2) if one_block else EAGER_KERNELS
    if sizes.own_attention:
        # our kernel reads the keys as they are, and another puts its pieces together
        others += 1
    elif one_block and sizes.kv_heads < sizes.heads:
        # compiled code writes keys and values once for each query head, a kernel for each, and reads them again
        read += 4 * batch * cache * sizes.heads * sizes.head_dim
        others += 2
    # one query walks over its keys in few programs, as long on the way as a small product
    attention = Stage("attention", 4 * batch * cache * sizes.heads * sizes.head_dim, read)
    parts = seconds_by_part(sizes, batch, 1, attention, device, itemsize)
    parts["elementwise"] += others * sizes.blocks * device.kernel_seconds
    return parts


def seconds_by_part(
    sizes: ModelSizes, batch: int, tokens: int, attention: Stage, device: Peaks, itemsize: int
) -> dict[str, float]:
    """attention: that of one block, in numbers."""
    t = batch * tokens
    block = {
        "projections": [s for group in sizes.groups for s in group_stages(group, t, itemsize, device.chip)],
        "attention": in_bytes([attention], itemsize),
        "elementwise": in_bytes(elementwise_stages(sizes, t), itemsize),
    }
    head = layer_stages(*sizes.head, batch, itemsize)
    first = [Stage("embeddings", 0, 2 * t * sizes.hidden * itemsize, product=False)]
    if sizes.patches:
        first = layer_stages(*sizes.patches, t, itemsize)
    last = in_bytes([norm_stage(sizes, t)], itemsize) * sizes.norms[1]
    found = {part: sizes.blocks * sum(stage.seconds(device) for stage in kernels) for part, kernels in block.items()}
    return found | {"once": sum(stage.seconds(device) for stage in (*first, *last, *head))}


def elementwise_stages(sizes: ModelSizes, tokens: int) -> Iterator[Stage]:
    """In numbers instead of bytes."""
    for _ in range(sizes.norms[0]):
        yield norm_stage(sizes, tokens)
    if sizes.rotary:
        yield Stage("rotate", 0, 2 * tokens * (sizes.heads + sizes.kv_heads) * sizes.head_dim, product=False)
    gated = sizes.activation[0] > sizes.activation[1]
    if not sizes.fused_activation or (gated and tokens > 1):
        yield Stage("activation", 0, tokens * sum(sizes.activation), product=False)


def norm_stage(sizes: ModelSizes, tokens: int) -> Stage:
    """A sum and its norm: two numbers read and two written."""
    return Stage("norm", 0, 4 * tokens * sizes.hidden, product=False)


def layer_stages(k: int, n: int, tokens: int, itemsize: int) -> list[Stage]:
    """Of a dense layer; its spec stands for its features alone."""
    return stages(LowRank(k, n, 1), tokens, "dense", itemsize)


def group_stages(group: tuple[Projection, ...], tokens: int, itemsize: int = 2, chip: Device = H100) -> list[Stage]:
    """The kernels of projections that run together: one first stage, and one of each other where sizes are equal.

    In float8 the cast alone is counted once.
    """
    each = [stages(p.spec, tokens, p.form, itemsize, p.adds, group.count(p), chip) for p in group]
    if len(each) == 1:
        return each[0]
    if group[0].form == "float8":
        cast = each[0][0]
        return [cast, *(stage for kernels in each for stage in kernels[1:])]
    x = tokens * group[0].spec.in_features * itemsize
    first = merged([kernels[0] for kernels in each])
    found = [replace(first, outside=first.outside - (len(each) - 1) * x)]
    if len(set(group)) == 1:
        return found + [merged(list(kernels)) for kernels in zip(*(k[1:] for k in each), strict=True)]
    return found + [stage for kernels in each for stage in kernels[1:]]


def merged(kernels: list[Stage]) -> Stage:
    """One kernel that does the work of all; their intermediates are one."""
    return replace(
        kernels[0],
        flops=sum(k.flops for k in kernels),
        outside=sum(k.outside for k in kernels),
        between=tuple(map(sum, zip(*(k.between for k in kernels), strict=True))),
        repeated=sum(k.repeated for k in kernels),
        tiles=sum(k.tiles for k in kernels),
    )
