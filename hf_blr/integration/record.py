"""What a model says about itself once it holds BLR modules, so that `save_pretrained` and a plain load work."""

from __future__ import annotations

from torch import nn

from hf_blr.config import QUANT_METHOD, BLRConfig
from hf_blr.linear import BLRLinear
from hf_blr.plan import Plan, layers_from_plan


def record_plan(model: nn.Module, config: BLRConfig, plan: Plan):
    """Write the resolved config into `model.config`, where `save_pretrained` and the loader look for it.

    Does nothing for a module without a transformers config.

    Args:
        model: holds the plan's BLR modules already, under the plan's names.
        config: what was asked for; it is not changed, and text in it is described rather than kept.
        plan: what every replaced module became.
    """
    if not has_config(model):
        return
    model.config.quantization_config = BLRConfig(**{**config.to_dict(), "layers": layers_from_plan(plan)})
    for part in submodels(model):
        # transformers then takes a module's dtype from its config; the alternative is its first nn.Linear
        part.config._is_quantized = True
    drop_fused_conversions(model, plan)
    model.add_model_tags([QUANT_METHOD])


def forget_plan(model: nn.Module):
    """Undo `record_plan` on a model that is dense again."""
    if not has_config(model):
        return
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for part in submodels(model):
        part.config._is_quantized = False
    if QUANT_METHOD in (model.model_tags or ()):
        model.model_tags.remove(QUANT_METHOD)


def has_config(model: nn.Module) -> bool:
    """Whether this is a transformers model; a plain module has nothing to record."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


def submodels(model: nn.Module) -> list[nn.Module]:
    """The transformers models inside this one, itself included."""
    return [module for module in model.modules() if has_config(module)]


def drop_fused_conversions(model: nn.Module, plan: Plan):
    """Keep `save_pretrained` from fusing factors as if they were dense weights.

    Some families store q, k and v as one matrix and split it while loading; saving runs the split backwards, and its
    patterns fit the factors' names too. Such a converter is dropped; the dense weights that it would have fused are
    saved one by one, under names that load as well.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    conversions = getattr(model, "_weight_conversions", None)
    built_in_memory = conversions is None
    if built_in_memory:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    keys = [f"{name}.{factor}" for name, layer in plan.items() for factor in layer.spec.factor_names]

    def catches_factors(conversion):
        if not isinstance(conversion, WeightConverter):
            return False
        backwards = conversion.reverse_transform()
        return any(backwards.rename_source_key(key)[1] is not None for key in keys)

    kept = [conversion for conversion in conversions if not catches_factors(conversion)]
    # without a converter to drop, transformers' own default for a model built in memory stays in force
    if len(kept) < len(conversions):
        # a renaming of a prefix tells what the file looked like; a model built in memory never saw one
        model._weight_conversions = (
            [c for c in kept if type(c).__name__ != "PrefixChange"] if built_in_memory else kept
        )


def blr_modules(model: nn.Module) -> dict[str, BLRLinear]:
    """{name: module} of every BLR module in the model, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BLRLinear)}
