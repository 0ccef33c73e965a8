"""The low-rank layer."""

from hf_blr.linear import BLRLinear
from hf_blr.structures.low_rank import LowRank


class LowRankLinear(BLRLinear):
    """x v^T u^T + bias; see `structures.LowRank`."""

    spec_class = LowRank
