"""Compressed models of diffusers: loaded and saved through its own quantiser hooks."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hf_blr.checkpoint.denoisers import write_config
from hf_blr.checkpoint.files import stored_tensors
from hf_blr.checkpoint.headers import check_count, check_files
from hf_blr.checkpoint.layout import match_plan, swap_in
from hf_blr.checkpoint.record import record_plan
from hf_blr.checkpoint.values import check_values
from hf_blr.checkpoint.verify import Expected, cast_parameters, check_bits, expected_tensors
from hf_blr.config import QUANT_METHOD, BLRConfig
from hf_blr.formats import FactorInBits
from hf_blr.integration.loading import to_dense
from hf_blr.plan import Plan, plan_from_layers


class MethodName(str):
    """The method's name, of which diffusers reads `value`, as of an enum."""

    @property
    def value(self) -> str:
        return str(self)


def register_diffusers(auto: ModuleType) -> None:
    """Tell diffusers which classes serve `quant_method: "hf_blr"`."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BLRConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = quantizer_class()


def quantizer_class() -> type[Any]:
    """Made on first use because it derives from a class of diffusers."""
    from diffusers.quantizers.base import DiffusersQuantizer

    class BLRDiffusersQuantizer(DiffusersQuantizer):
        """Swaps BLR modules in before the weights come; fits those of a dense checkpoint when they are there.

        Unlike that of transformers it does not stream: diffusers puts tensor after tensor where the model has them.
        """

        def __init__(self, quantization_config: BLRConfig, **kwargs: Any):
            super().__init__(copy.deepcopy(quantization_config), **kwargs)
            self.quantization_config.quant_method = MethodName(QUANT_METHOD)
            self.files: list[str] = []
            self.plan: Plan = {}
            self.expected: Expected = {}

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            if not self.pre_quantized and self.quantization_config.calibrated:
                raise ValueError(
                    "text says nothing of what a denoiser reads: load the dense model, and call hf_blr.compress(model, "
                    "config, calibration=hf_blr.denoising_batches(pipeline, calls))"
                )

        def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
            self.files = list(map(str, checkpoint_files))
            return loaded_keys

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            if not self.pre_quantized:
                return
            layers = self.quantization_config.layers or {}
            stored = list(stored_tensors(self.files))
            check_count(layers, stored)
            self.plan = match_plan(model, plan_from_layers(layers))
            check_files(model, self.plan, stored)
            swap_in(model, self.plan)
            self.expected = expected_tensors(model)

        def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
            if self.pre_quantized and missing_keys:
                raise ValueError(
                    f"{missing_keys[0]}: the checkpoint lacks this and {len(missing_keys) - 1} more tensors, which "
                    "would stay random; save or fetch it again"
                )
            return missing_keys

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            # factors are ordinary parameters, and diffusers would refuse .half() of a model that it takes for quantised
            model.is_quantized = False
            config = copy.copy(self.quantization_config)
            config.quant_method = QUANT_METHOD
            if self.pre_quantized:
                cast_back(model, self.expected)
                check_bits(model)
                check_values(model)
                record_plan(model, config, self.plan)
            else:
                from hf_blr.compression import compress

                write_config(model, None)
                compress(model, config, progress=False)
            return model

        @property
        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

        def _dequantize(self, model: Any) -> Any:
            return to_dense(model)

    return BLRDiffusersQuantizer


def cast_back(model: nn.Module, expected: Expected) -> None:
    """Every tensor to its own dtype; for codes and scales that is without a loss where what they were cast to is wider.

    Raises:
        ValueError: if scales were cast to float16, which has not their range.
    """
    for name, module in model.named_modules():
        if not isinstance(module, FactorInBits):
            continue
        for key, (_, kind) in module.storage.parts(module.shape).items():
            part, dtype = getattr(module, key), module.storage.dtypes[kind]
            if part.dtype == torch.float16 != dtype:
                raise ValueError(
                    f"{name}.{key}: torch_dtype=torch.float16 rounds scales that are stored in {dtype}; load in "
                    "bfloat16 or float32, and cast the model afterwards"
                )
            part.data = part.data.to(dtype)
    cast_parameters(model, expected)
