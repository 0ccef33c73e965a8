"""Functional form of the structures: `low_rank_linear`, `monarch_linear`, `blast_linear`."""

from hf_blr.ops.reference import blast_linear, low_rank_linear, monarch_linear

__all__ = ["blast_linear", "low_rank_linear", "monarch_linear"]
