"""The quantizer that transformers calls while it loads a model with a `BLRConfig`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.base import HfQuantizer

from hf_blr.checkpoint.files import stored_tensors
from hf_blr.checkpoint.headers import check_count, check_files
from hf_blr.checkpoint.layout import match_plan, swap_in
from hf_blr.checkpoint.origin import base_name, record_origin
from hf_blr.checkpoint.record import forget_quantizer, holders, record_plan
from hf_blr.checkpoint.values import check_values
from hf_blr.checkpoint.verify import check_loaded, expected_tensors, is_loaded, mark_loaded
from hf_blr.config import BLRConfig
from hf_blr.config.checks import check_without_text
from hf_blr.experts import layer_named
from hf_blr.integration.loading import to_dense
from hf_blr.integration.parallel import refuse_sharded, refuse_tensor_parallel
from hf_blr.integration.streaming import (
    Awaited,
    FactorizeOp,
    add_placeholder,
    finish_placeholder,
    fit_weight,
    placeholder_for,
)
from hf_blr.plan import Plan, plan_from_layers, resolve_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BLRHfQuantizer(HfQuantizer):
    """Swaps BLR modules in before the weights come, and checks what came.

    From a dense checkpoint each weight becomes factors as it streams in, so memory peaks near the compressed
    size. From a BLR checkpoint the factors load as they are. Afterwards the quantizer detaches itself: the
    factors are ordinary parameters, and transformers would refuse `.half()` and compiled training, and ignore
    `save_pretrained(state_dict=...)`, on a model that it takes for quantised.
    """

    #: the base class keeps it, as any config
    quantization_config: BLRConfig

    def __init__(self, quantization_config: BLRConfig, **kwargs: Any):
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.plan: Plan = {}
        #: {name of a dense weight: what waits for it}
        self.awaiting: dict[str, Awaited] = {}
        self.refused: list[str] = []
        self.expected: dict[str, tuple[torch.Size, torch.dtype]] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized and self.quantization_config.calibrated:
            raise ValueError(
                "BLRConfig.dataset asks for a fit to activations, which cannot be seen while a checkpoint "
                "streams in: switch hf_blr's from_pretrained on with hf_blr.enable(), or load the dense "
                "model and call hf_blr.compress(model, config, tokenizer=tokenizer)"
            )
        if not self.pre_quantized and self.quantization_config.turned:
            raise ValueError(
                "BLRConfig.turned turns the whole model, which is not there while a checkpoint streams in: switch "
                "hf_blr's from_pretrained on with hf_blr.enable(), or load the dense model and call "
                "hf_blr.compress(model, config)"
            )
        if not self.pre_quantized:
            check_without_text(self.quantization_config)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        refuse_tensor_parallel(getattr(model.config, "distributed_config", None))
        layers = self.quantization_config.layers
        stored = list(stored_tensors(checkpoint_files or [])) if self.pre_quantized else []
        if layers:
            check_count(layers, stored)
            self.plan = match_plan(model, plan_from_layers(layers))
        else:
            self.plan = resolve_plan(model, self.quantization_config)
        if self.pre_quantized:
            check_files(model, self.plan, stored)
        weights = {name: placeholder_for(layer_named(model, name)) for name in self.plan}
        modules = swap_in(model, self.plan)
        if not self.pre_quantized:
            self.awaiting |= dict(add_placeholder(model, name, modules[name], weights[name]) for name in modules)
        self.expected = expected_tensors(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.awaiting

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        # the dense weight is gone before the next one comes: it needs no room in a device map
        return 0 if param_name in self.awaiting else param.element_size()

    def get_quantize_ops(self) -> FactorizeOp:
        return FactorizeOp(self.awaiting, self.quantization_config, self.refused)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        refuse_sharded(model)
        if self.refused:
            raise ValueError("; ".join(self.refused))
        self.fit_leftovers()
        check_loaded(model, self.expected, complete=self.pre_quantized)
        if self.pre_quantized:
            check_values(model)
        record_plan(model, self.quantization_config, self.plan)
        if not self.pre_quantized:
            record_origin(holders(model), base_model=base_name(model))
        forget_quantizer(model)
        return model

    def fit_leftovers(self) -> None:
        """Fit the weights that were loaded past `FactorizeOp`.

        The loader asks `param_needs_quantization` for the first weight of a fused projection only.

        Raises:
            ValueError: if a weight never came.
        """
        for name, awaited in list(self.awaiting.items()):
            module, weight = awaited.module, awaited.holder.get_parameter(awaited.key)
            if weight.is_meta:
                raise ValueError(
                    f"{name}: offloaded to disk before it could be compressed; load it without disk offload"
                )
            if not is_loaded(weight):
                raise ValueError(
                    f"{name}: the checkpoint has no such weight, so there is nothing to compress; leave this "
                    "module dense with modules_to_not_convert"
                )
            factors = fit_weight(name, module, weight.detach(), self.quantization_config)
            finish_placeholder(name, self.awaiting)
            if awaited.holder is not module:
                # the loader put the weight in the module's place
                setattr(awaited.holder, awaited.key, module)
            for key, tensor in factors.items():
                module.put(key, tensor)
                mark_loaded(module.stored()[key])

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> torch.nn.Module:
        return to_dense(model)
