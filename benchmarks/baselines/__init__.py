"""What other papers do, written from the papers, to compare with: a file for each method.

All keep one share of the parameters of the same projections, and all that read text read the same calibration windows.
"""

from baselines.blast_descent import blast_by_gradients
from baselines.svd_llm import svd_llm_updated

__all__ = ["blast_by_gradients", "svd_llm_updated"]
