"""Monarch: each pair of an input and an output block has a low-rank matrix of its own."""

from __future__ import annotations

from hf_blr.structures.pieces import WHOLE, Piece, cut, length, scaled
from hf_blr.structures.record import Structure
from hf_blr.structures.spec import BLRSpec


class Monarch(BLRSpec):
    """Block (i, j) of W is u_ij v_ij, of rank `rank` each (arXiv 2204.00595, with general block rank).

    v `[B1, B2*R, P]`: rows `i*R ... (i+1)*R` of v[j] feed output block i. u `[B2, Q, B1*R]`: columns
    `j*R ... (j+1)*R` of u[i] read input block j. Output blocks are contiguous, so no permutation is left.
    """

    structure = "monarch"
    default_blocks = (4, 4)
    blocked = True

    def sizes(self) -> dict[str, tuple[int, ...]]:
        (b1, b2), (p, q) = self.num_blocks, self.block_shape
        return {"u": (b2, q, b1 * self.rank), "v": (b1, b2 * self.rank, p)}

    def outputs(self, start: int, stop: int) -> Piece:
        b1, b2 = self.num_blocks
        blocks, rows = cut(self.out_features, b2, start, stop)
        spec = Monarch(self.in_features, stop - start, self.rank, (b1, length(blocks, b2)))
        return Piece(spec, {"u": (blocks, rows, WHOLE), "v": (WHOLE, scaled(blocks, self.rank), WHOLE)})

    def inputs(self, start: int, stop: int) -> Piece:
        b1, b2 = self.num_blocks
        blocks, columns = cut(self.in_features, b1, start, stop)
        spec = Monarch(stop - start, self.out_features, self.rank, (length(blocks, b1), b2))
        return Piece(spec, {"v": (blocks, WHOLE, columns), "u": (WHOLE, WHOLE, scaled(blocks, self.rank))})

    @staticmethod
    def parameters_per_rank(in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        return num_blocks[1] * in_features + num_blocks[0] * out_features


RECORD = Structure(
    spec=Monarch,
    summary="block (i, j) of W is u_ij v_ij, by descent over block columns",
    linear="hf_blr.structures.monarch.reference:monarch_linear",
    dense="hf_blr.structures.monarch.reference:monarch_dense",
    experts="hf_blr.structures.monarch.reference:monarch_experts",
    fits="hf_blr.structures.monarch.reference:fits",
    module="hf_blr.structures.monarch.layer:MonarchLinear",
    fit="hf_blr.structures.monarch.fit:fit",
    finish="hf_blr.structures.monarch.fit:balanced",
    rounding="hf_blr.structures.monarch.rounding:rounded",
    stages="hf_blr.structures.monarch.stages:forward_stages",
    backward_stages="hf_blr.structures.monarch.stages:backward_stages",
    colour="#2ca02c",
    auto_blocks=((4, 4),),
    # the last stage takes steps of each block pair's rank
    rank_multiple=32,
    kernels="hf_blr.ops.triton.monarch",
    grouped="hf_blr.ops.triton.grouped_monarch",
    float8="hf_blr.ops.triton.float8_monarch",
    packed="hf_blr.ops.triton.packed:monarch",
)
