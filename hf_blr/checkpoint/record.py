"""What a model says about itself once it holds BLR modules, so that saving and a plain load work."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, TypeGuard

from torch import nn

from hf_blr.checkpoint.alignment import align
from hf_blr.checkpoint.denoisers import denoiser_class, is_denoiser, write_config
from hf_blr.checkpoint.notice import post_notice, take_notice_down
from hf_blr.config import QUANT_METHOD, BLRConfig
from hf_blr.linear import blr_modules
from hf_blr.plan import Plan, layers_from_plan, plan_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform


def record_replaced(models: list[PreTrainedModel], config: BLRConfig | None = None) -> None:
    """Make the config of each of these models say what is replaced in it now, under its own names.

    Args:
        models: of `holders`. One that is all dense again forgets its plan.
        config: what was asked for; None keeps what each model says of that.
    """
    for model in models:
        plan = plan_in_place(model)
        if plan:
            record_plan(model, config or getattr(model.config, "quantization_config", None), plan)
            forget_quantizer(model)
        else:
            forget_plan(model)


def holders(module: nn.Module) -> list[PreTrainedModel]:
    """The models of transformers or diffusers by which BLR modules of this module are saved, the largest last.

    They are the module itself, or what it wraps (`torch.compile`, `DataParallel`), and what it is a part of: whoever
    compresses `t5.encoder` may save the encoder alone or all of `t5`.
    """
    replaced = {id(layer) for layer in blr_modules(module).values()}
    within = {id(part) for part in module.modules()}
    holding = [model for model in live_models() if any(id(part) in replaced for part in model.modules())]
    inside = [model for model in holding if id(model) in within]
    around = [model for model in holding if id(model) not in within]
    # a part may share its config with the whole, whose names then stand in it: they are found from both
    return outermost(inside) + outermost(around)


def outermost(models: list[PreTrainedModel]) -> list[PreTrainedModel]:
    """Those that are part of no other."""
    inner = {id(part) for model in models for part in model.modules() if part is not model}
    return [model for model in models if id(model) not in inner]


def live_models() -> list[PreTrainedModel]:
    """Every model in memory that saves itself: those of transformers, and of diffusers where it is in use."""
    from transformers import PreTrainedModel

    kinds = tuple(kind for kind in (PreTrainedModel, denoiser_class()) if kind is not None)
    classes = {id(found): found for found in subclasses(kinds)}
    # a module does not know what holds it, and the collector knows every module. No line of Python runs while all
    # objects are held: another thread could then go on with a tuple that it is building, and get a SystemError
    types = map(id, map(type, chain.from_iterable(map(gc.get_objects, (None,)))))
    alive = set(filter(classes.__contains__, types))
    # an object refers to its class; so do few others
    found = gc.get_referrers(*(classes[key] for key in alive)) if alive else []
    # a model that another thread is just building may have no parts yet
    return [model for model in found if id(type(model)) in alive and "_modules" in vars(model)]


def subclasses(kinds: Iterable[type]) -> set[type]:
    """These classes, and all that inherit from them."""
    return {each for kind in kinds for each in (kind, *subclasses(kind.__subclasses__()))}


def record_plan(model: nn.Module, config: BLRConfig | None, plan: Plan) -> None:
    """Write the resolved config into `model.config`, where `save_pretrained` and the loader look for it.

    Does nothing to a module that saves itself by neither transformers nor diffusers.

    Args:
        model: holds the plan's BLR modules already, under the plan's names.
        config: what was asked for; it is not changed, and text in it is described rather than kept. None: not known.
        plan: what every replaced module became.
    """
    asked = {} if config is None else config.to_dict()
    resolved = BLRConfig(**{**asked, "layers": layers_from_plan(plan)})
    if is_denoiser(model):
        write_config(model, resolved)
        align(model)
    if not is_transformers_model(model):
        return
    model.config.quantization_config = resolved
    for part in submodels(model):
        # transformers then reads a module's dtype from its config, instead of from its first nn.Linear
        part.config._is_quantized = True
    drop_fused_conversions(model, plan)
    post_notice(model.config)
    align(model)
    model.add_model_tags([QUANT_METHOD])


def forget_plan(model: nn.Module) -> None:
    """Undo `record_plan` on a model that is dense again, and on its parts, which may have been compressed alone."""
    if is_denoiser(model):
        write_config(model, None)
    if not is_transformers_model(model):
        return
    for part in submodels(model):
        if hasattr(part.config, "quantization_config"):
            del part.config.quantization_config
            take_notice_down(part.config)
        part.config._is_quantized = False
        tags = part.model_tags or []
        if QUANT_METHOD in tags:
            tags.remove(QUANT_METHOD)


def forget_quantizer(model: nn.Module) -> None:
    """Take back the marks by which transformers treats the model as quantised; its config keeps the plan.

    Besides our own they are those of a GGUF file, whose weights are plain numbers once they are loaded: transformers
    5.17 would refuse to train the model. Does nothing to a module that is no transformers model.
    """
    if not is_transformers_model(model):
        return
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    model.is_quantized = False  # type: ignore[assignment]


def is_transformers_model(module: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether there is a config to write to, of the kind that transformers saves and loads."""
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def submodels(model: nn.Module) -> list[PreTrainedModel]:
    """The transformers models in this one, itself included; each has a config of its own."""
    return [module for module in model.modules() if is_transformers_model(module)]


def drop_fused_conversions(model: PreTrainedModel, plan: Plan) -> None:
    """Keep `save_pretrained` from fusing factors as if they were dense weights.

    Some families store q, k and v as one matrix and split it while loading; saving runs the split backwards,
    and its patterns fit the factors' names too. Such a converter is dropped; the dense weights that it would
    have fused are saved one by one, under names that load as well.
    """
    conversions = conversions_for_saving(model)
    keys = [f"{name}.{factor}" for name, layer in plan.items() for factor in layer.storage.stored(layer.spec)]
    kept = [conversion for conversion in conversions if not fuses(conversion, keys)]
    if len(kept) < len(conversions):
        model._weight_conversions = kept  # type: ignore[assignment]


def conversions_for_saving(model: PreTrainedModel) -> list[WeightTransform]:
    """The conversions that `save_pretrained` would run backwards."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    used = getattr(model, "_weight_conversions", None)
    if used is not None:
        return used
    # a change of prefix depends on the file that was loaded, and this model was built in memory
    default = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in default if type(conversion).__name__ != "PrefixChange"]


def fuses(conversion: WeightTransform, keys: list[str]) -> bool:
    """Whether the conversion, run backwards, takes one of these keys for a part of a fused tensor."""
    from transformers.core_model_loading import WeightConverter

    if not isinstance(conversion, WeightConverter):
        return False
    backwards = conversion.reverse_transform()
    return any(backwards.rename_source_key(key)[1] is not None for key in keys)
