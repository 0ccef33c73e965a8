"""DoRA on BLR modules: the norms of its rows without the dense matrix (arXiv 2402.09353)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.linear import BLRLinear


class BLRMagnitude(nn.Module):
    """The magnitudes `[N]` of one adapter, under the key by which PEFT saves them.

    With D = s B A, row n of W + D has the squared norm |W_n|^2 + 2 <W_n, D_n> + |D_n|^2. The layer itself gives the
    middle term, applied to the r rows of A, and A A^T `[r, r]` the last. The first changes with the factors alone.

    Args:
        layer: the BLR module.
        a, b: the adapter's A `[r, K]` and B `[N, r]`.
        scaling: s.
    """

    def __init__(self, layer: BLRLinear, a: Tensor, b: Tensor, scaling: float):
        super().__init__()
        #: |W_n|^2 of all rows, and the factors that they belong to
        self.rows: tuple[Tensor, list[tuple[Tensor, int, int]]] | None = None
        self.weight = nn.Parameter(self.norms(layer, a, b, scaling))

    @torch.no_grad()
    def norms(self, layer: BLRLinear, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """|W_n + s (B A)_n| as `[N]` in A's dtype, worked out in float32 or better."""
        wide = torch.promote_types(a.dtype, torch.float32)
        images = layer(a.to(layer.dtype)) if layer.bias is None else layer(a.to(layer.dtype)) - layer.bias
        a_wide, b_wide = a.to(wide), b.to(wide)
        crossed = (images.T.to(wide) * b_wide).sum(1)
        added = (b_wide @ (a_wide @ a_wide.T) * b_wide).sum(1)
        squared = self.row_squares(layer, wide).to(a.device) + 2 * scaling * crossed + scaling**2 * added
        return squared.clamp_min(0).sqrt().to(a.dtype)

    def row_squares(self, layer: BLRLinear, dtype: torch.dtype) -> Tensor:
        """|W_n|^2 as `[N]`: worked out once, and again when a factor has changed."""
        if torch.compiler.is_compiling():
            return layer.dense_weight(dtype).square().sum(1)
        held = [(tensor, tensor.data_ptr(), tensor._version) for tensor in layer.stored().values()]
        same = self.rows is not None and all(
            old is new and rest == others for (old, *rest), (new, *others) in zip(self.rows[1], held, strict=True)
        )
        if self.rows is None or not same:
            self.rows = layer.dense_weight(dtype).square().sum(1), held
        return self.rows[0]

    def forward(self, x: Tensor, base: Tensor, a: nn.Linear, b: nn.Linear, scaling: float, layer: BLRLinear) -> Tensor:
        """What is added to the layer's output; base is W x without bias. The norms get no gradient (section 4.3)."""
        scale = (self.weight / self.norms(layer, a.weight, b.weight, scaling)).to(base.dtype)
        added: Tensor = (scale - 1) * base + scale * scaling * b(a(x))
        return added


@functools.cache
def dora_variant() -> type[Any]:
    """The variant of PEFT's LoRA layer; made on first use because it derives from a class of PEFT."""
    from peft.tuners.lora.layer import LoraVariant

    class BLRDora(LoraVariant):
        """DoRA for an adapter of a LoRA layer around a BLR module."""

        @staticmethod
        def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
            if not module.lora_magnitude_vector:
                module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
            a, b = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
            magnitude = BLRMagnitude(module.get_base_layer(), a, b, module.scaling[adapter_name])
            module.lora_magnitude_vector[adapter_name] = magnitude

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
            layer, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
            if isinstance(dropout, nn.Identity) or not module.training:
                base = result
            else:
                x = dropout(x)
                base = layer(x)
            added: Tensor = module.lora_magnitude_vector[active_adapter](
                x,
                base if layer.bias is None else base - layer.bias,
                module.lora_A[active_adapter],
                module.lora_B[active_adapter],
                module.scaling[active_adapter],
                layer,
            )
            return result + added

        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
            """W `[N, K]` -> m (W + D) / |W + D|, row by row."""
            merged = orig_weight + module.get_delta_weight(active_adapter).to(orig_weight)
            magnitudes: Tensor = module.lora_magnitude_vector[active_adapter].weight.to(orig_weight)
            return merged * (magnitudes / merged.norm(dim=1))[:, None]

    return BLRDora
