"""Compressed models in plain PyTorch, for what knows no op of ours: exporters and other runtimes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.checkpoint.notice import EXPORTED, post_notice
from hf_blr.checkpoint.record import holders, record_replaced
from hf_blr.experts import ExpertsLinear, PlainExperts, PlainFactors
from hf_blr.integration.loading import refuse_offloaded, unadapted_modules
from hf_blr.linear import BLRLinear
from hf_blr.ops.table import implementation_of
from hf_blr.structures import structure_named


class LinearPair(nn.Sequential):
    """Two `nn.Linear`, K x R and R x N, which compute what one of K x N does.

    Models that read the weight or the bias of a layer find the product of the two, and the second one's.
    """

    def __init__(self, first: nn.Linear, second: nn.Linear):
        super().__init__(first, second)
        self.in_features, self.out_features = first.in_features, second.out_features

    @property
    def weight(self) -> Tensor:
        """The dense matrix `[N, K]`."""
        first, second = self.parts()
        return second.weight @ first.weight

    @property
    def bias(self) -> nn.Parameter | None:
        return self.parts()[1].bias

    def parts(self) -> tuple[nn.Linear, nn.Linear]:
        first, second = self
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        return first, second


class PlainLinear(PlainFactors):
    """The factors of a layer under its structure's plain form: products of PyTorch alone, without a registered op."""

    def __init__(self, module: BLRLinear):
        super().__init__(module)
        self.register_parameter("bias", module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., K]` -> `[..., N]`."""
        return implementation_of(self.structure).linear(x, *self.held(), bias=self.bias)

    @property
    def weight(self) -> Tensor:
        """The dense matrix `[N, K]`, for models that read it."""
        return implementation_of(self.structure).dense(*self.held())


def to_linears(model: nn.Module) -> nn.Module:
    """Put plain PyTorch in the place of every BLR layer, so that the model can be exported.

    Low-rank and pivoted layers become two `nn.Linear` one after the other (`LinearPair`), whose sizes are K x R and
    R x N; a pivoted one stores R^2 numbers more then. Layers of `structure="dense"` become an `nn.Linear` (or
    `Conv1D`), others a `PlainLinear`. Experts become `PlainExperts`, which copy the factors of each token's experts for
    it: memory grows with the tokens. Factors in bits become numbers of the model's dtype. Outputs differ by rounding
    alone.

    Works in place, one layer at a time, and returns the model. There is no way back: such a model can be run, trained
    and exported, and what `save_pretrained` writes of it is refused by every load.

    Raises:
        ValueError: before anything is changed, if the model has no BLR modules, is offloaded, or carries adapters.
        NotImplementedError: likewise, for experts of a structure that runs them one after the other alone.
    """
    modules = unadapted_modules(model)
    for name, module in modules.items():
        if isinstance(module, ExpertsLinear) and module.alone:
            raise NotImplementedError(
                f"{name}: {module.spec.structure} runs one expert after the other, which no exporter follows; make the "
                "model dense with hf_blr.to_dense(model), or compress it with modules_to_not_convert for its experts"
            )
    refuse_offloaded(model)
    recorded = holders(model)
    try:
        for name, module in modules.items():
            model.set_submodule(name, plain_form(module))
    finally:
        record_replaced(recorded)
    for holder in recorded:
        post_notice(holder.config, EXPORTED)
    return model


@torch.no_grad()
def plain_form(module: BLRLinear) -> nn.Module:
    """What computes the same without an op of ours, in the mode of the layer and of its dtype and device."""
    record = structure_named(module.spec.structure)
    if record.whole and not isinstance(module, ExpertsLinear):
        return module.to_dense()
    pair: Any = record.load("pair")
    plain: nn.Module
    if isinstance(module, ExpertsLinear):
        plain = PlainExperts(module)
    elif pair is None:
        plain = PlainLinear(module)
    else:
        u, v = pair(**module.tensors())
        plain = LinearPair(linear_of(v, None), linear_of(u, module.bias))
    trains = next((factor.requires_grad for factor in module.factors().values()), True)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(trains if not name.endswith("bias") else parameter.requires_grad)
    return plain.train(module.training)


def linear_of(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An `nn.Linear` that holds these."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.detach().contiguous()), bias  # type: ignore[assignment]
    return linear
