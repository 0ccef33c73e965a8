"""Models of diffusers, which keep their plan in a config of another kind than those of transformers."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from hf_blr.config import BLRConfig


def denoiser_class() -> type[nn.Module] | None:
    """The class of models that diffusers saves and loads; None where no program has imported it."""
    return getattr(sys.modules.get("diffusers.models.modeling_utils"), "ModelMixin", None)


def is_denoiser(module: nn.Module) -> bool:
    found = denoiser_class()
    return found is not None and isinstance(module, found)


def write_config(model: nn.Module, config: BLRConfig | None) -> None:
    """Make `model.config` say this of what is compressed, which `save_pretrained` writes; None: nothing."""
    denoiser: Any = model
    kept = {key: value for key, value in denoiser.config.items() if key != "quantization_config"}
    # configs of diffusers are frozen, and can be replaced as a whole alone
    denoiser._internal_dict = type(denoiser.config)(kept | ({} if config is None else {"quantization_config": config}))
