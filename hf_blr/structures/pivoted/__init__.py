"""Pivoted: low-rank, stored without the numbers that change nothing."""

from __future__ import annotations

import math

from hf_blr.structures.pieces import WHOLE, Piece
from hf_blr.structures.record import Structure
from hf_blr.structures.spec import FACTOR, INDEX, BLRSpec


class Pivoted(BLRSpec):
    """Low-rank without its redundancy: W = u [I c] P, R (N + K - R) numbers for a matrix of rank R.

    u `[N, R]`, c `[R, K - R]`, order `[K]` integers: the first R of the input features in this order pass as they are,
    and c adds the others to them. A pair of factors (u, v) holds R^2 numbers that change nothing, as (u A, A^-1 v) is
    the same matrix; here A makes R columns of v the identity. The form of PIFA (Zhao et al., ICML 2025, PMLR 267),
    with pivots among the inputs. One block on each side.
    """

    structure = "pivoted"
    kinds = {"u": FACTOR, "c": FACTOR, "order": INDEX}

    @property
    def equivalent_rank(self) -> float:
        return float(self.rank)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        # a rank as large as the matrix has no other features; it stores no less than the dense matrix
        rest = max(0, self.in_features - self.rank)
        return {"u": (self.out_features, self.rank), "c": (self.rank, rest), "order": (self.in_features,)}

    def outputs(self, start: int, stop: int) -> Piece:
        # some columns of [I c] have no identity in them, so that there are no `inputs`
        return Piece(Pivoted(self.in_features, stop - start, self.rank), {"u": (slice(start, stop), WHOLE)})

    def flops(self, tokens: int) -> int:
        return 2 * tokens * (self.num_parameters - self.in_features)

    @classmethod
    def parameters_at(cls, rank: int, in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        # beyond the smaller side a rank stores more and says no more
        return rank * (out_features + max(0, in_features - rank)) + in_features

    @classmethod
    def rank_within(cls, parameters: int, in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        most, both = parameters - in_features, in_features + out_features
        if most < both - 1:
            return 0
        # the smaller root of R^2 - (N + K) R + most, rounded down; with integers, as floats lose the last digits
        root = both * both - 4 * most
        rank = min(in_features, out_features) if root < 0 else (both - math.isqrt(root)) // 2
        rank = min(rank, in_features, out_features)
        while rank and cls.parameters_at(rank, in_features, out_features, num_blocks) > parameters:
            rank -= 1
        return rank


RECORD = Structure(
    spec=Pivoted,
    summary="low-rank with R columns of v an identity that is not stored: more rank for the same size",
    linear="hf_blr.structures.pivoted.reference:pivoted_linear",
    dense="hf_blr.structures.pivoted.reference:pivoted_dense",
    experts="hf_blr.structures.pivoted.reference:pivoted_experts",
    fits="hf_blr.structures.pivoted.reference:fits",
    module="hf_blr.structures.pivoted.layer:PivotedLinear",
    fit="hf_blr.structures.low_rank.fit:fit",
    finish="hf_blr.structures.pivoted.pivots:finish",
    rounding="hf_blr.structures.pivoted.rounding:rounded",
    stages="hf_blr.structures.pivoted.stages:forward_stages",
    backward_stages="hf_blr.structures.pivoted.stages:backward_stages",
    colour="#17becf",
    closed_form=True,
    scaled=("u",),
    auto_blocks=((1, 1),),
    kernels="hf_blr.ops.triton.pivoted",
    stand_in="hf_blr.structures.pivoted.pairs",
    pair="hf_blr.structures.pivoted.reference:pivoted_pair",
    typical_indices="hf_blr.structures.pivoted.pivots:random_indices",
    float8="hf_blr.ops.triton.float8_pivoted",
    packed="hf_blr.ops.triton.packed:pivoted",
)
