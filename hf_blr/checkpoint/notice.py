"""The line of a checkpoint's config that ends a load by a transformers which does not know the format.

transformers warns of an unknown `quant_method` and goes on, with random weights in the place of the factors. An
attention implementation that it does not know, however, it refuses, for every class of model, and quotes its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: the key of config.json that a model is built by; it is never written otherwise
KEY = "attn_implementation"
#: a name without a slash, which would be looked for on the hub
NOTICE = "hf_blr: this model is compressed; pip install hf-blr, and import hf_blr before it is loaded"
#: of a model that no class of transformers builds; the package passes it over as little as transformers does
EXPORTED = "hf_blr: to_linears made this model to be exported; save the compressed model instead, before to_linears"


def post_notice(config: PreTrainedConfig, notice: str = NOTICE) -> None:
    """Make the next `save_pretrained` write the notice."""
    # transformers refuses such a config for any attention but the eager one
    if not getattr(config, "output_attentions", False):
        setattr(config, KEY, notice)


def take_notice_down(config: PreTrainedConfig) -> None:
    """Undo `post_notice`, and forget a notice that was read from a file."""
    if getattr(config, KEY, None) == NOTICE:
        delattr(config, KEY)
    if config._attn_implementation == NOTICE:
        config._attn_implementation = None
