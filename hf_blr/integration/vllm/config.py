"""What vLLM asks of a checkpoint's `quantization_config`: which method each of its layers takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from hf_blr.config import QUANT_METHOD, BLRConfig
from hf_blr.integration.vllm.method import BLRLinearMethod
from hf_blr.plan import Plan, plan_from_layers


class ServedConfig(QuantizationConfig):
    """The plan of a compressed checkpoint, under vLLM's names.

    Raises:
        NotImplementedError: for a plan with experts.
    """

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan
        experts = [name for name, layer in plan.items() if layer.experts]
        if experts:
            raise NotImplementedError(
                f"{experts[0]}: compressed experts cannot be served by vLLM yet; run the model with transformers, or "
                "compress it with its experts in modules_to_not_convert"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ServedConfig:
        """From the dict in `config.json`.

        Raises:
            ValueError: for a dict that no `BLRConfig` takes, or of a model that was not compressed yet.
        """
        layers = BLRConfig.from_dict(config).layers
        if not layers:
            raise ValueError(
                "the checkpoint's quantization_config lists no layers, so its weights are dense; compress the model, "
                "and serve what save_pretrained wrote"
            )
        return cls(plan_from_layers(layers))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        # plain PyTorch runs where the kernels do not; this is vLLM's own oldest
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that vLLM's model has for the checkpoint's modules."""
        self.plan = hf_to_vllm_mapper.apply_dict(self.plan)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; None for what is no linear layer.

        Raises:
            NotImplementedError: if a layer that is no linear one of vLLM's stands in the plan.
        """
        if isinstance(layer, LinearBase):
            names = self.matrices(prefix)
            if any(name in self.plan for name in names):
                return BLRLinearMethod({name: self.plan.get(name) for name in names})
            return UnquantizedLinearMethod()
        if prefix in self.plan:
            raise NotImplementedError(
                f"{prefix}: vLLM has a {type(layer).__name__} here, which cannot be served compressed; compress the "
                "model with this module in modules_to_not_convert"
            )
        return None

    def matrices(self, prefix: str) -> list[str]:
        """The checkpoint's names for the matrices that vLLM holds in one layer, in vLLM's order."""
        if prefix in self.plan:
            # files that have q, k and v in one matrix
            return [prefix]
        parent, dot, name = prefix.rpartition(".")
        return [f"{parent}{dot}{part}" for part in self.packed_modules_mapping.get(name, [name])]
