"""How vLLM's linear layers hold, load and run compressed matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearMethodBase

from hf_blr.integration.vllm.division import Division, shards_of
from hf_blr.integration.vllm.slots import add_slots
from hf_blr.plan import LayerPlan


class BLRLinearMethod(LinearMethodBase):
    """One method for one layer of vLLM's, which may hold several matrices of the checkpoint (q, k and v, say).

    Args:
        plans: {name in the checkpoint: plan} of its matrices in vLLM's order; None for one that is dense.
    """

    def __init__(self, plans: Mapping[str, LayerPlan | None]):
        self.plans = plans

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer a `Shard` for each matrix, and parameters by which vLLM's loader finds them.

        Raises:
            ValueError: if the plan has other sizes than the model, or a matrix cannot be split over the devices.
            NotImplementedError: if one matrix of the checkpoint holds several of vLLM's and is to be split.
        """
        division = Division(
            rank=layer.tp_rank,
            inputs=(input_size, input_size_per_partition),
            outputs=(output_size, tuple(output_partition_sizes)),
            replicas=getattr(layer, "num_kv_head_replicas", 1),
        )
        layer.shards = nn.ModuleList(shards_of(self.plans, division, params_dtype))
        add_slots(layer, list(layer.shards))
        # the sum over devices is shorter before a low-rank layer's last product than after it
        self.sums_rank = (
            division.splits_inputs and getattr(layer, "reduce_results", False) and layer.shards[0].keeps_a_pair
        )
        if self.sums_rank:
            layer.reduce_results = False

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises ValueError if a tensor never came; a server of random weights (`dummy`) needs none."""
        config = get_current_vllm_config_or_none()
        if config is not None and config.load_config.load_format == "dummy":
            return
        missing = [f"{shard.name}.{key}" for shard in layer.shards for key in sorted(shard.missing)]
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}; save the compressed model again")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[..., K]` -> `[..., N]`, the outputs of the matrices beside one another."""
        if self.sums_rank:
            return self.apply_summed(layer, x)
        shards = list(layer.shards)
        if len(shards) == 1:
            return shards[0](x, bias)
        widths = [shard.piece.spec.out_features for shard in shards]
        biases = [None] * len(shards) if bias is None else bias.split(widths)
        return torch.cat([shard(x, part) for shard, part in zip(shards, biases, strict=True)], dim=-1)

    def apply_summed(self, layer: Any, x: Tensor) -> Tensor:
        """The finished output of a layer whose inputs are split: devices add up R numbers a token in place of N."""
        shard = layer.shards[0]
        y = tensor_model_parallel_all_reduce(shard.times("v", x))
        # vLLM hands the bias to the first device alone, which adds it before its own sum
        return shard.times("u", y, None if layer.skip_bias_add else layer.bias)
