"""Block low-rank compression of Hugging Face models: low-rank, Monarch and BLAST layers in place of dense ones.

Importing this package teaches transformers to load and save such models, and `from_pretrained` the keyword
`blr_config=`. Everything else is imported when it is first used.
"""

from importlib import import_module

from hf_blr.integration import register

__version__ = "0.1.0.dev0"

_HOMES = {
    "BLRCallback": "hf_blr.finetune",
    "BLRConfig": "hf_blr.config",
    "BLRLinear": "hf_blr.linear",
    "Blast": "hf_blr.structures",
    "CompressionReport": "hf_blr.compression",
    "LowRank": "hf_blr.structures",
    "Pivoted": "hf_blr.structures",
    "Monarch": "hf_blr.structures",
    "collect_statistics": "hf_blr.calibration",
    "compress": "hf_blr.compression",
    "disable": "hf_blr.integration",
    "enable": "hf_blr.integration",
    "from_config": "hf_blr.integration",
    "fuse": "hf_blr.inference.fusion",
    "lora_targets": "hf_blr.integration",
    "perplexity": "hf_blr.evaluation",
    "to_dense": "hf_blr.integration",
    "tune": "hf_blr.inference.tuning",
    "unfuse": "hf_blr.inference.fusion",
}

__all__ = [*sorted(_HOMES), "__version__"]  # noqa: RUF022


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_blr' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return __all__


register()
