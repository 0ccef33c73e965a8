"""Low-rank: W = u v."""

from __future__ import annotations

from hf_blr.structures.pieces import WHOLE, Piece
from hf_blr.structures.record import Structure
from hf_blr.structures.spec import BLRSpec


class LowRank(BLRSpec):
    """W = u v, with u `[N, R]` and v `[R, K]`. One block on each side."""

    structure = "low_rank"

    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {"u": (self.out_features, self.rank), "v": (self.rank, self.in_features)}

    def outputs(self, start: int, stop: int) -> Piece:
        return Piece(LowRank(self.in_features, stop - start, self.rank), {"u": (slice(start, stop), WHOLE)})

    def inputs(self, start: int, stop: int) -> Piece:
        return Piece(LowRank(stop - start, self.out_features, self.rank), {"v": (WHOLE, slice(start, stop))})

    @staticmethod
    def parameters_per_rank(in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        return in_features + out_features


RECORD = Structure(
    spec=LowRank,
    summary="W = u v: two plain products, in closed form",
    linear="hf_blr.structures.low_rank.reference:low_rank_linear",
    dense="hf_blr.structures.low_rank.reference:low_rank_dense",
    experts="hf_blr.structures.low_rank.reference:low_rank_experts",
    fits="hf_blr.structures.low_rank.reference:fits",
    module="hf_blr.structures.low_rank.layer:LowRankLinear",
    fit="hf_blr.structures.low_rank.fit:fit",
    finish="hf_blr.factorize.balance:balanced",
    rounding="hf_blr.structures.low_rank.rounding:rounded",
    stages="hf_blr.structures.low_rank.stages:forward_stages",
    backward_stages="hf_blr.structures.low_rank.stages:backward_stages",
    colour="#1f77b4",
    closed_form=True,
    auto_blocks=((1, 1),),
    kernels="hf_blr.ops.triton.low_rank",
    kernels_pay="hf_blr.ops.rules.low_rank:kernels_pay",
    pair="hf_blr.structures.low_rank.reference:low_rank_pair",
    # low-rank is Monarch with one block
    grouped="hf_blr.ops.triton.grouped_monarch",
    float8="hf_blr.ops.triton.float8_low_rank",
    float8_grouped="hf_blr.ops.triton.float8_low_rank:grouped",
    packed="hf_blr.ops.triton.packed:low_rank",
)
