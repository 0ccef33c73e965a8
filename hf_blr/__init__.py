"""Block low-rank compression of Hugging Face models: low-rank, Monarch and BLAST layers in place of dense ones.

Importing this package teaches transformers to load and save such models, and `from_pretrained` the keyword
`blr_config=`. Everything else is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_blr.integration import register

if TYPE_CHECKING:
    from hf_blr.calibration import Statistics, collect_statistics, denoising_batches
    from hf_blr.compression import CompressionReport, compress, turn_stream
    from hf_blr.config import BLRConfig
    from hf_blr.evaluation import Perplexity, perplexity
    from hf_blr.finetune import BLRCallback
    from hf_blr.inference import fuse, tune, unfuse
    from hf_blr.integration import (
        disable,
        enable,
        from_config,
        lora_targets,
        merge_adapters,
        to_dense,
        to_format,
        to_linears,
    )
    from hf_blr.linear import BLRLinear
    from hf_blr.structures import Blast, LowRank, Monarch, Pivoted

__version__ = "0.2.0"

_HOMES = {
    "BLRCallback": "hf_blr.finetune",
    "BLRConfig": "hf_blr.config",
    "BLRLinear": "hf_blr.linear",
    "Blast": "hf_blr.structures",
    "CompressionReport": "hf_blr.compression",
    "LowRank": "hf_blr.structures",
    "Monarch": "hf_blr.structures",
    "Perplexity": "hf_blr.evaluation",
    "Pivoted": "hf_blr.structures",
    "Statistics": "hf_blr.calibration",
    "collect_statistics": "hf_blr.calibration",
    "compress": "hf_blr.compression",
    "denoising_batches": "hf_blr.calibration",
    "disable": "hf_blr.integration",
    "enable": "hf_blr.integration",
    "from_config": "hf_blr.integration",
    "fuse": "hf_blr.inference",
    "lora_targets": "hf_blr.integration",
    "merge_adapters": "hf_blr.integration",
    "perplexity": "hf_blr.evaluation",
    "to_dense": "hf_blr.integration",
    "to_format": "hf_blr.integration",
    "to_linears": "hf_blr.integration",
    "tune": "hf_blr.inference",
    "turn_stream": "hf_blr.compression",
    "unfuse": "hf_blr.inference",
}

__all__ = [
    "BLRCallback",
    "BLRConfig",
    "BLRLinear",
    "Blast",
    "CompressionReport",
    "LowRank",
    "Monarch",
    "Perplexity",
    "Pivoted",
    "Statistics",
    "__version__",
    "collect_statistics",
    "compress",
    "denoising_batches",
    "disable",
    "enable",
    "from_config",
    "fuse",
    "lora_targets",
    "merge_adapters",
    "perplexity",
    "to_dense",
    "to_format",
    "to_linears",
    "tune",
    "turn_stream",
    "unfuse",
]


# type checkers know the names from above, and shall report all others
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'hf_blr' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


register()
