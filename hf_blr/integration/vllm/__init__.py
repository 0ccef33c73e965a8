"""Compressed checkpoints in vLLM: `register` is the plugin that `vllm serve` finds by its entry point.

vLLM calls it in every process, and reads the class of a checkpoint's `quant_method` from what it registered. Nothing
of vLLM is imported before.
"""

from __future__ import annotations

import logging
from importlib.metadata import version

from packaging.version import Version

from hf_blr.config import QUANT_METHOD

__all__ = ["OLDEST", "register"]

logger = logging.getLogger(__name__)

#: the oldest release that the tests have run with
OLDEST = "0.22.1"


def register() -> None:
    """Tell vLLM which class reads `quant_method: "hf_blr"`. A second call changes nothing.

    With a vLLM older than `OLDEST` it warns and registers nothing: an error would end vLLM for every other model too.
    """
    found = version("vllm")
    if Version(found) < Version(OLDEST):
        logger.warning("hf_blr serves compressed checkpoints with vLLM %s or later, found %s", OLDEST, found)
        return
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        from hf_blr.integration.vllm.config import ServedConfig

        register_quantization_config(QUANT_METHOD)(ServedConfig)
