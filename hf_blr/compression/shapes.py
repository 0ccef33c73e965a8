"""Which structures, blocks and ranks a layer may take."""

from __future__ import annotations

from dataclasses import replace

from hf_blr.config import AUTO, BLRConfig
from hf_blr.plan.ranks import rank_step
from hf_blr.structures import BLRSpec, structures

#: smallest ratio that a layer may keep: the prediction is local and says little about ruins
FLOOR = 0.1
#: ranks are multiples of a power of two up to this, which kernels like
LARGEST_STEP = 16


def ratio_of(config: BLRConfig) -> float:
    if config.ratio is None:
        raise ValueError("layers that share a budget need a ratio of what they cost: set BLRConfig(ratio=...)")
    return config.ratio


def at_rank_one(spec: BLRSpec) -> BLRSpec:
    """The structure and blocks of this spec at rank 1."""
    return replace(spec, rank=1)


def shapes_for(spec: BLRSpec, config: BLRConfig) -> list[BLRSpec]:
    """What the layer may become, each at rank 1: its own structure and blocks, or all candidates with "auto".

    Where the blocks of a candidate do not divide a layer, the layer does without it.
    """
    k, n = spec.in_features, spec.out_features
    if config.structure != AUTO:
        return [at_rank_one(spec)]
    shapes = [
        record.spec(k, n, 1, blocks)
        for record in structures().values()
        for blocks in record.auto_blocks
        if k % blocks[0] == 0 and n % blocks[1] == 0
    ]
    return [shape for shape in shapes if shape.num_parameters < shape.dense_parameters]


def at_ranks(shape: BLRSpec, floor: float, ceiling: float, multiple: int | None = None) -> list[BLRSpec]:
    """The structure and blocks at the ranks worth considering, from the floor to almost dense.

    multiple: `BLRConfig.rank_multiple`, of which a layer takes no notice where that leaves it fewer than eight ranks.
    """
    dense, sizes = shape.dense_parameters, (shape.in_features, shape.out_features, shape.num_blocks)
    highest = shape.rank_within(min(dense - 1, int(ceiling * dense)), *sizes)
    step = 1
    while step < LARGEST_STEP and 2 * step <= highest / 16:
        step *= 2
    if multiple is not None and (wanted := rank_step(shape, multiple)) <= highest / 8:
        step = wanted
    lowest = max(step, -(-shape.rank_within(int(floor * dense), *sizes) // step) * step)
    return [replace(shape, rank=rank) for rank in range(lowest, highest + 1, step)]


def at_ratio(shape: BLRSpec, ratio: float) -> BLRSpec:
    """The structure and blocks at the rank that the ratio buys, of at least 1."""
    dense = shape.dense_parameters
    within = shape.rank_within(
        min(int(ratio * dense), dense - 1), shape.in_features, shape.out_features, shape.num_blocks
    )
    return replace(shape, rank=max(1, within))


def fit_cost(spec: BLRSpec) -> float:
    """About how long a fit takes, or a curve of losses: both decompose a matrix of the smaller side."""
    return float(min(spec.in_features, spec.out_features)) ** 3
