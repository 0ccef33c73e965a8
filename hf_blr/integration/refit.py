"""LoRA adapters merged into factors by fitting these anew, which is not exact: the error is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.factorize import factorize, relative_error
from hf_blr.formats import Factors
from hf_blr.linear import BLRLinear
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, structure_named

logger = logging.getLogger(__name__)

#: of L-BFGS from the factors as they are, for structures without a closed form
STEPS = 100


@dataclass(frozen=True)
class Refit:
    """One layer whose factors took an adapter in.

    rel_error: ||W' - T|| / ||T|| in the Frobenius norm, of the stored matrix W' to the sum T of layer and adapter.
    without: the same of the layer without the adapter: what is lost if it is dropped.
    """

    rel_error: float
    without: float


#: {id of a LoRA layer: its refit} while `merge_adapters` refits
_refits: ContextVar[dict[int, Refit] | None] = ContextVar("refits", default=None)


def merge_adapters(peft_model: nn.Module, merge: str = "exact") -> tuple[nn.Module, dict[str, Refit]]:
    """Merge the active LoRA adapters of a PEFT model, and take them off.

    Args:
        peft_model: of `peft.get_peft_model`; use what is returned in its place.
        merge: "exact" merges adapters of dense layers, and refuses those of BLR layers, whose sum with a low-rank
            matrix does not fit into the factors. "refit" fits these to the sum, to its weights alone, at the rank that
            they have: in closed form where there is one, else by descent from the factors as they are.

    Returns:
        The model without adapters, and {name of a BLR layer: its `Refit`}. A warning sums the errors up.

    Raises:
        NotImplementedError: for "exact", if a BLR layer carries an adapter.
        ValueError: for another word.
        TypeError: if it is no PEFT model.
    """
    if merge not in ("exact", "refit"):
        raise ValueError(f'merge must be "exact" or "refit", got {merge!r}')
    if not hasattr(peft_model, "merge_and_unload"):
        raise TypeError(
            f"{type(peft_model).__name__} carries no adapters to merge: give what peft.get_peft_model or "
            "PeftModel.from_pretrained made of it"
        )
    model: Any = peft_model
    if merge == "exact":
        return model.merge_and_unload(), {}
    layers = {id(module): name for name, module in model.get_base_model().named_modules()}
    with refitting() as refits:
        merged = model.merge_and_unload()
    found = {layers[key]: refit for key, refit in refits.items()}
    if found:
        worst = max(found, key=lambda name: found[name].rel_error)
        logger.warning(
            "%d layers were fitted anew to their sum with an adapter: mean relative error %.4f, worst %.4f (%s); "
            "without their adapters they would be %.4f off",
            len(found),
            sum(refit.rel_error for refit in found.values()) / len(found),
            found[worst].rel_error,
            worst,
            sum(refit.without for refit in found.values()) / len(found),
        )
    return merged, found


@contextmanager
def refitting() -> Iterator[dict[int, Refit]]:
    """Inside the `with`, LoRA layers around BLR modules merge by re-fit, and say here what came of it."""
    refits: dict[int, Refit] = {}
    token = _refits.set(refits)
    try:
        yield refits
    finally:
        _refits.reset(token)


def merge_by_refit(lora: Any, adapter_names: list[str]) -> None:
    """Put a BLR module with these adapters taken in in the place of the LoRA layer's own.

    Raises:
        NotImplementedError: outside of `refitting`.
        ValueError: if an adapter has a bias and the layer none.
    """
    refits = _refits.get()
    if refits is None:
        raise NotImplementedError(
            "a LoRA adapter cannot be merged exactly into block low-rank factors; keep it beside them, fit the factors "
            'anew with hf_blr.merge_adapters(peft_model, merge="refit"), or take it off with unload(), make the model '
            "dense with hf_blr.to_dense(model), and merge it there"
        )
    module: BLRLinear = lora.get_base_layer()
    dense = module.dense_weight(torch.promote_types(module.dtype, torch.float32)).detach()
    target, bias = dense, module.bias
    for name in adapter_names:
        if name in lora.lora_variant:
            target = lora.lora_variant[name].merge_safe(lora, name, target)
        else:
            target = target + lora.get_delta_weight(name).detach().to(target)
        if lora.lora_bias[name]:
            if bias is None:
                raise ValueError(
                    "an adapter with a bias cannot be merged into a layer without one; set lora_bias=False"
                )
            bias = nn.Parameter(bias.detach() + lora.lora_B[name].bias.detach().to(bias) * lora.scaling[name])
    target = target.detach()
    fitted = BLRLinear.from_fit(module.spec, refitted(module, target), module, module.storage)
    fitted.bias = bias
    for name, factor in fitted.factors().items():
        factor.requires_grad_(getattr(module, name).requires_grad)
    error = relative_error(target, fitted.dense_weight(target.dtype).detach())
    refits[id(lora)] = Refit(error, relative_error(target, dense))
    lora.base_layer = fitted
    lora.merged_adapters.extend(adapter_names)


def refitted(module: BLRLinear, target: Tensor) -> Factors:
    """Factors of the module's sizes and format for another matrix `[N, K]`, which is near the one that it holds."""
    record = structure_named(module.spec.structure)
    if record.closed_form or record.whole:
        return factorize(target, module.spec, storage=module.storage).tensors
    return descended(module, target)


def descended(module: BLRLinear, target: Tensor) -> Factors:
    """Factors by L-BFGS on the squared error, from those that the module has."""
    # of this size for steps and tolerances
    scale = target.square().mean().sqrt()
    names = module.spec.names(FACTOR)
    tensors = {name: tensor.detach() for name, tensor in module.tensors(target.dtype).items()}
    factors = {name: tensors[name].to(target.dtype, copy=True).requires_grad_() for name in names}
    optimizer = torch.optim.LBFGS(factors.values(), max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        matrix = implementation_of(module.spec.structure).dense(**{**tensors, **factors})
        error = ((matrix - target) / scale).square().mean()
        error.backward()
        return error

    with torch.enable_grad():
        optimizer.step(loss)
    return {**tensors, **{name: factor.detach() for name, factor in factors.items()}}
