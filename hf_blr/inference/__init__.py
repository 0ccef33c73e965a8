"""What runs at inference beside the layers themselves: fused projections, attention of one query, launch settings."""

from hf_blr.inference.compiling import compile_kernels
from hf_blr.inference.fusion import fuse, unfuse
from hf_blr.inference.tuning import tune

__all__ = ["compile_kernels", "fuse", "tune", "unfuse"]
