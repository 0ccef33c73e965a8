"""From a config and a dense model to a compressed one: the plan, the budget, the fits and their order."""

from hf_blr.compression.journal import Journal
from hf_blr.compression.pipeline import compress, parameter_sizes
from hf_blr.compression.report import CompressionReport, LayerReport
from hf_blr.compression.shards import Shards
from hf_blr.compression.turning import turn_stream

__all__ = ["CompressionReport", "Journal", "LayerReport", "Shards", "compress", "parameter_sizes", "turn_stream"]
