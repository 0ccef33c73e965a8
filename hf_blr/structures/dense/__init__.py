"""Dense: the whole matrix, for layers that a format alone makes smaller."""

from __future__ import annotations

from hf_blr.structures.pieces import WHOLE, Piece
from hf_blr.structures.record import Structure
from hf_blr.structures.spec import FACTOR, BLRSpec


class Dense(BLRSpec):
    """W itself: w `[N, K]`, one block, and the rank that such a matrix can have at most."""

    structure = "dense"
    kinds = {"w": FACTOR}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank != min(self.in_features, self.out_features):
            raise ValueError(
                f"a dense {self.out_features}x{self.in_features} matrix has rank "
                f"{min(self.in_features, self.out_features)}, got {self.rank}"
            )

    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {"w": (self.out_features, self.in_features)}

    @classmethod
    def whole(cls, in_features: int, out_features: int) -> Dense:
        """The sizes of a matrix of full rank."""
        return cls(in_features, out_features, min(in_features, out_features))

    def outputs(self, start: int, stop: int) -> Piece:
        return Piece(Dense.whole(self.in_features, stop - start), {"w": (slice(start, stop), WHOLE)})

    def inputs(self, start: int, stop: int) -> Piece:
        return Piece(Dense.whole(stop - start, self.out_features), {"w": (WHOLE, slice(start, stop))})

    @classmethod
    def parameters_at(cls, rank: int, in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        return in_features * out_features

    @classmethod
    def rank_within(cls, parameters: int, in_features: int, out_features: int, num_blocks: tuple[int, int]) -> int:
        return min(in_features, out_features) if parameters >= in_features * out_features else 0


RECORD = Structure(
    spec=Dense,
    summary="W itself, for layers that a format alone makes smaller",
    linear="hf_blr.structures.dense.reference:dense_linear",
    dense="hf_blr.structures.dense.reference:dense_dense",
    experts="hf_blr.structures.dense.reference:dense_experts",
    fits="hf_blr.structures.dense.reference:fits",
    module="hf_blr.structures.dense.layer:DenseLinear",
    fit="hf_blr.structures.dense.fit:fit",
    finish="hf_blr.structures.dense.fit:finish",
    rounding="hf_blr.structures.dense.rounding:rounded",
    stages="hf_blr.structures.dense.stages:forward_stages",
    backward_stages="hf_blr.structures.dense.stages:backward_stages",
    colour="#7f7f7f",
    closed_form=True,
    weighed="",
    scaled=("w",),
    whole=True,
    float8="hf_blr.ops.triton.float8_dense",
    packed="hf_blr.ops.triton.packed:dense",
)
