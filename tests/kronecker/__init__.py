"""A fifth structure, as somebody else's package would bring one: a sum of Kronecker products, without kernels."""

from __future__ import annotations

from hf_blr.structures import FACTOR, BLRSpec, Structure


class Kronecker(BLRSpec):
    """Block (i, j) of W is the sum over r of a[i, j, r] b[r]; a `[B2, B1, R]`, b `[R, Q, P]`."""

    structure = "kronecker"
    default_blocks = (4, 4)
    blocked = True
    kinds = {"a": FACTOR, "b": FACTOR}

    def sizes(self):
        (b1, b2), (p, q) = self.num_blocks, self.block_shape
        return {"a": (b2, b1, self.rank), "b": (self.rank, q, p)}

    def flops(self, tokens):
        (b1, b2), (p, q) = self.num_blocks, self.block_shape
        return 2 * tokens * self.rank * q * b1 * (p + b2)

    @staticmethod
    def parameters_per_rank(in_features, out_features, num_blocks):
        b1, b2 = num_blocks
        return b1 * b2 + (in_features // b1) * (out_features // b2)


RECORD = Structure(
    spec=Kronecker,
    summary="a sum of R Kronecker products",
    linear="kronecker.parts:kronecker_linear",
    dense="kronecker.parts:kronecker_dense",
    fits="kronecker.parts:fits",
    module="kronecker.parts:KroneckerLinear",
    fit="kronecker.parts:fit",
    finish="kronecker.parts:finish",
    stages="kronecker.parts:forward_stages",
    backward_stages="kronecker.parts:backward_stages",
    colour="#8c564b",
    closed_form=True,
    weighed="",
    scaled=("a", "b"),
    auto_blocks=((4, 4),),
)
