"""Matrices of a model that no plan can name."""

from __future__ import annotations

import logging

from torch import nn

from hf_blr.dense import is_dense_linear
from hf_blr.experts import tensors_of
from hf_blr.linear import BLRLinear
from hf_blr.targets import NARROWEST, in_repeated_block, leaf, steers_nothing

logger = logging.getLogger(__name__)

#: layers whose weight is no matrix that multiplies features
WITHOUT_MATRIX = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
#: of a model's parameters; smaller matrices outside of linear layers are tables of positions and the like
LEAST_SHARE = 0.01


def warn_of_unreached(model: nn.Module) -> None:
    """Matrices of repeated blocks that lie in no linear layer stay dense; say which, and how much of the model."""
    unreached: dict[str, int] = {}
    for name, module in model.named_modules():
        if not in_repeated_block(name) or not steers_nothing(name) or isinstance(module, WITHOUT_MATRIX):
            continue
        if is_dense_linear(module) or isinstance(module, BLRLinear):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            if key in tensors_of(module):
                continue
            if parameter.dim() > 1 and min(parameter.shape[-2:]) >= NARROWEST:
                kind = f"{leaf(name)}.{key}"
                unreached[kind] = unreached.get(kind, 0) + parameter.numel()
    share = sum(unreached.values()) / sum(p.numel() for p in model.parameters())
    if share >= LEAST_SHARE:
        logger.warning(
            "matrices that lie in no linear layer stay dense: %s, %.0f %% of the model's parameters",
            ", ".join(unreached),
            100 * share,
        )
