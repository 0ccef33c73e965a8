"""The Monarch layer."""

from hf_blr.linear import BLRLinear
from hf_blr.structures.monarch import Monarch


class MonarchLinear(BLRLinear):
    """Block (i, j) of the matrix is u_ij v_ij; see `structures.Monarch`."""

    spec_class = Monarch
