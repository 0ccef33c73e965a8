"""BLAST: all pairs of blocks share the factors of their row and column, coupled by a diagonal of their own."""

from __future__ import annotations

from hf_blr.structures.pieces import WHOLE, Piece, cut, length
from hf_blr.structures.record import Structure
from hf_blr.structures.spec import FACTOR, BLRSpec


class Blast(BLRSpec):
    """Block (i, j) of W is u_i diag(s_ij) v_j (arXiv 2410.21262).

    u `[B2, Q, R]`, s `[B2, B1, R]`, v `[B1, R, P]`. All s equal to one is low-rank; 0/1 patterns in s give Monarch.
    """

    structure = "blast"
    # 4 x 16 keeps most of the accuracy of 16 x 16 with an intermediate a quarter as large
    default_blocks = (4, 16)
    blocked = True
    kinds = {"u": FACTOR, "s": FACTOR, "v": FACTOR}
    elementwise = ("s",)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        (b1, b2), (p, q) = self.num_blocks, self.block_shape
        return {"u": (b2, q, self.rank), "s": (b2, b1, self.rank), "v": (b1, self.rank, p)}

    def outputs(self, start: int, stop: int) -> Piece:
        b1, b2 = self.num_blocks
        blocks, rows = cut(self.out_features, b2, start, stop)
        spec = Blast(self.in_features, stop - start, self.rank, (b1, length(blocks, b2)))
        return Piece(spec, {"u": (blocks, rows, WHOLE), "s": (blocks, WHOLE, WHOLE)})

    def inputs(self, start: int, stop: int) -> Piece:
        b1, b2 = self.num_blocks
        blocks, columns = cut(self.in_features, b1, start, stop)
        spec = Blast(stop - start, self.out_features, self.rank, (length(blocks, b1), b2))
        return Piece(spec, {"v": (blocks, WHOLE, columns), "s": (WHOLE, blocks, WHOLE)})

    @staticmethod
    def parameters_per_rank(in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        return in_features + out_features + num_blocks[0] * num_blocks[1]


RECORD = Structure(
    spec=Blast,
    summary="block (i, j) of W is u_i diag(s_ij) v_j, by accelerated alternating least squares",
    linear="hf_blr.structures.blast.reference:blast_linear",
    dense="hf_blr.structures.blast.reference:blast_dense",
    experts="hf_blr.structures.blast.reference:blast_experts",
    fits="hf_blr.structures.blast.reference:fits",
    module="hf_blr.structures.blast.layer:BlastLinear",
    fit="hf_blr.structures.blast.fit:fit",
    finish="hf_blr.structures.blast.fit:finish",
    rounding="hf_blr.structures.blast.rounding:rounded",
    stages="hf_blr.structures.blast.stages:forward_stages",
    backward_stages="hf_blr.structures.blast.stages:backward_stages",
    colour="#d62728",
    auto_blocks=((4, 4), (4, 16), (16, 16)),
    kernels="hf_blr.ops.triton.blast",
    grouped="hf_blr.ops.triton.grouped_blast",
    float8="hf_blr.ops.triton.float8_blast",
    packed="hf_blr.ops.triton.packed:blast",
)
