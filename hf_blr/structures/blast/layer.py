"""The BLAST layer."""

import math

from hf_blr.linear import BLRLinear
from hf_blr.structures.blast import Blast


class BlastLinear(BLRLinear):
    """Block (i, j) of the matrix is u_i diag(s_ij) v_j; see `structures.Blast`."""

    spec_class = Blast

    def initial_std(self) -> dict[str, float]:
        # u sums R products of z, and z sums B1 of them
        return {**super().initial_std(), "s": 1 / math.sqrt(self.spec.num_blocks[0])}
