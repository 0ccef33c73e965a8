"""Dense weights into factors, one by one, while a checkpoint is being loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from hf_blr.config import BLRConfig
from hf_blr.experts import ExpertsLinear, ExpertsTensor
from hf_blr.factorize import factorize
from hf_blr.factorize.finite import check_finite
from hf_blr.formats.values import check_fit
from hf_blr.integration.memory import trim
from hf_blr.linear import BLRLinear

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Awaited:
    """A dense weight that the loader shall bring: a placeholder in `holder` under `key`, and the module that waits."""

    module: BLRLinear
    holder: nn.Module
    key: str


class FactorizeOp(ConversionOps):
    """Replaces each awaited dense weight that passes through by its factors.

    Args:
        awaiting: {name of a dense weight: what waits for it}; shared with the quantizer, fitted names are taken out.
        config: how to fit.
        refused: messages about weights that cannot be fitted; shared with the quantizer, which raises them.
            The loader would turn an exception from here into "some issues during automatic conversion".
    """

    def __init__(self, awaiting: dict[str, Awaited], config: BLRConfig, refused: list[str]):
        self.awaiting, self.config, self.refused = awaiting, config, refused

    def convert(
        self, input_dict: dict[str, Any], *args: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """{parameter: tensor or [tensor]}, with factors where awaited weights were."""
        out: dict[str, Any] = {}
        # a fused projection was split just before, and comes as several weights, of which some may not be
        # ours
        for name, value in input_dict.items():
            if name not in self.awaiting:
                out[name] = value
            elif not self.refused:
                # by now the loader has let the weight before this one go
                trim()
                out |= self.fit(name, value[0] if isinstance(value, list) else value)
                if name not in self.awaiting and missing_keys is not None:
                    missing_keys.discard(name)
        return out

    def fit(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """{full state-dict key: tensor}; for a weight that cannot be fitted nothing, and a message."""
        try:
            factors = fit_weight(name, self.awaiting[name].module, weight, self.config)
        except ValueError as error:
            self.refused.append(str(error))
            return {}
        except RuntimeError:
            # the loader shows no traceback; without this line nothing would say which module it was
            logger.exception("%s could not be factorised", name)
            raise
        finish_placeholder(name, self.awaiting)
        # of a linear layer the weight is a part, of experts the parameter itself is the layer
        layer = name.removesuffix(".weight")
        return {f"{layer}.{factor}": tensor for factor, tensor in factors.items()}


def fit_weight(name: str, module: BLRLinear, weight: torch.Tensor, config: BLRConfig) -> dict[str, torch.Tensor]:
    """What the module keeps, {state-dict key: tensor}, for a dense weight; for its dtype and on its device.

    Args:
        name: of the weight, for messages.
        module: waits for this weight; says its spec and whether it is stored `[K, N]`.
        weight: `[N, K]`, or `[K, N]` where the module replaces a `Conv1D`; of experts with a leading axis.
        config: how to fit.

    Raises:
        ValueError: if the weight has another shape than the model expects, or holds NaN or infinite values, or the
            factors do not fit into its dtype.
    """
    if weight.shape != module.weight.shape:
        raise ValueError(
            f"{name}: the model expects the shape {tuple(module.weight.shape)}, the checkpoint has "
            f"{tuple(weight.shape)}; load it with its own config.json"
        )
    check_finite(name, weight, "repair the checkpoint, or leave this module dense with modules_to_not_convert")
    if isinstance(module, ExpertsLinear):
        kept = (fit_matrix(f"{name}.{i}", module, matrix, config) for i, matrix in enumerate(weight))
        spec, storage, dtype = module.spec, module.storage, weight.dtype
        each = [BLRLinear.from_factors(spec, stored, storage=storage, dtype=dtype) for stored in kept]
        return {key: tensor.detach() for key, tensor in ExpertsLinear.stacked(each, module.transposed).stored().items()}
    return fit_matrix(name, module, weight, config)


def fit_matrix(name: str, module: BLRLinear, weight: torch.Tensor, config: BLRConfig) -> dict[str, torch.Tensor]:
    """Likewise of a single matrix, that of a linear layer or of one expert, which is finite and of the right shape."""
    matrix = (weight.T if module.transposed else weight).to(config.device_for(weight))
    fitted = factorize(matrix, module.spec, options=config.fit_options(module.in_features), storage=module.storage)
    logger.info("%s: relative error %.4f after %d rounds", name, fitted.rel_error, fitted.rounds)
    stored = module.storage.pack(module.spec, fitted.tensors, weight.dtype, weight.device)
    try:
        check_fit(module.spec, module.storage, stored)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return stored


def placeholder_for(layer: nn.Module) -> nn.Parameter:
    """The dense parameter of a layer that is about to be replaced."""
    if isinstance(layer, ExpertsTensor):
        stored: nn.Parameter = layer.owner.get_parameter(layer.key)
        return stored
    return layer.get_parameter("weight")


def add_placeholder(model: nn.Module, name: str, module: BLRLinear, weight: nn.Parameter) -> tuple[str, Awaited]:
    """Show the loader the dense weight that this module waits for; returns its name, and what waits for it."""
    if isinstance(module, ExpertsLinear):
        parent, _, key = name.rpartition(".")
        awaited = Awaited(module, model.get_submodule(parent), key)
    else:
        name, awaited = f"{name}.weight", Awaited(module, module, "weight")
    # a plain assignment would meet the property, or the module, of this name
    awaited.holder._parameters[awaited.key] = weight
    return name, awaited


def finish_placeholder(name: str, awaiting: dict[str, Awaited]) -> None:
    """The weight has become factors: its module no longer waits for it."""
    awaited = awaiting.pop(name)
    del awaited.holder._parameters[awaited.key]
