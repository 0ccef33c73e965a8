"""What other papers do, written from the papers, to compare with: a file for each method.

All keep one share of the parameters of the same projections, and all that read text read the same calibration windows.
"""

from baselines.aa_svd import aa_svd
from baselines.blast_descent import blast_by_gradients
from baselines.modegpt import modegpt
from baselines.svd_llm import svd_llm_updated
from baselines.torchao_weights import torchao_weights

__all__ = ["aa_svd", "blast_by_gradients", "modegpt", "svd_llm_updated", "torchao_weights"]
