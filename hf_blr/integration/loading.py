"""BLR models without a checkpoint: back to dense, to another format, and from a config with random factors."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_blr.checkpoint.layout import match_plan, swap_in
from hf_blr.checkpoint.notice import take_notice_down
from hf_blr.checkpoint.record import holders, record_plan, record_replaced
from hf_blr.config import BLRConfig
from hf_blr.experts import ExpertsLinear, multiply_out
from hf_blr.formats import Format, format_named
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.plan import plan_from_layers, resolve_plan
from hf_blr.structures import structure_named

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


def to_dense(model: nn.Module) -> nn.Module:
    """Multiply all factors out: every BLR module becomes the `nn.Linear` or `Conv1D` it stands for.

    Works in place, one module at a time, and returns the model, whose config no longer mentions hf_blr. Of a part of a
    compressed model, the whole one's config is kept right too.

    Raises:
        ValueError: if the model has no BLR modules, is offloaded, or carries adapters on them.
    """
    modules = unadapted_modules(model)
    refuse_offloaded(model)
    recorded = holders(model)
    try:
        multiply_out(model, modules)
    finally:
        # stopped half-way, the configs name what is left
        record_replaced(recorded)
    return model


def to_format(model: nn.Module, name: str, group_size: int | None = None) -> nn.Module:
    """Store the factors of a compressed model in another format: rounded to fewer bits, or as numbers in "plain".

    Works in place, one module at a time, and returns the model, whose config names the format. Layers of
    `structure="dense"` stay as they are. So do, with a warning, layers that would take no less than in 16 bits.

    Args:
        model: a compressed model, or a part of one.
        name: of `formats.FORMATS`.
        group_size: numbers along a row of a factor that share a scale; None: the whole row.

    Raises:
        ValueError: before anything is changed, for an unknown format, if groups do not divide the rows of a layer's
            factors, or if the model has no factors, is offloaded, or carries adapters on them.
    """
    storage = format_named(name, group_size)
    modules = {
        path: module
        for path, module in unadapted_modules(model).items()
        if not structure_named(module.spec.structure).whole
    }
    if not modules:
        raise ValueError(f"{type(model).__name__} has no factors that could be stored in {name}; compress it first")
    for path, module in modules.items():
        problem = storage.misfit(module.spec)
        if problem is not None:
            raise ValueError(f"{path}: {problem}")
    refuse_offloaded(model)
    recorded = holders(model)
    try:
        for path, module in modules.items():
            waste = storage.waste(module.spec)
            if waste is not None:
                logger.warning("%s: stays in the format %s: %s", path, module.storage.name, waste)
                continue
            model.set_submodule(path, in_format(module, storage))
    finally:
        # stopped half-way, the configs name the formats as they are
        record_replaced(recorded)
    return model


def in_format(module: BLRLinear, storage: Format) -> BLRLinear:
    """The same layer with its factors in this format."""
    if not isinstance(module, ExpertsLinear):
        return BLRLinear.from_fit(module.spec, module.tensors(), module, storage)
    factors, dtype, device = module.tensors(), module.dtype, module.device
    found = ExpertsLinear.of_factors(module.spec, factors, module.transposed, storage, dtype, device)
    return found.train(module.training)


def unadapted_modules(model: nn.Module) -> dict[str, BLRLinear]:
    """The model's BLR modules. Raises ValueError if one carries an adapter, or there is none."""
    modules = blr_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no BLR modules; compress it first")
    adapted = [name for name in modules if name.endswith(".base_layer")]
    if adapted:
        raise ValueError(f"{adapted[0]} carries an adapter; take it off first with peft_model.unload()")
    return modules


def refuse_offloaded(model: nn.Module) -> None:
    """Raises ValueError if some weights are on disk or wait behind an offload hook."""
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ValueError(
            f"{away[0]} is offloaded ({len(away)} parameters are), and factors must be in memory to be "
            "multiplied out or rounded; load the model without device_map, or with one that holds all of it"
        )


def from_config(
    config: PreTrainedConfig,
    model_class: type[Any] | None = None,
    *,
    blr_config: BLRConfig | dict[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A new BLR model with random weights, as `model_class.from_config(config)` gives a new dense one.

    transformers' own `from_config` builds the dense model even where the config describes a compressed one.

    Args:
        config: a transformers config; a `quantization_config` of ours in it says what to compress.
        model_class: a model class or Auto class; default: the class named in `config.architectures`.
        blr_config: what to compress, where `config` does not say.
        **kwargs: for the class's `from_config`, such as `dtype`.

    Raises:
        ValueError: if neither or both say what to compress, no class is given and the config names none, or the
            `blr_config` asks for a turned model.
    """
    stored = getattr(config, "quantization_config", None)
    if (stored is None) == (blr_config is None):
        raise ValueError(
            "from_config needs one BLRConfig, in config.quantization_config or as blr_config=, got "
            + ("both" if stored is not None else "neither")
        )
    given: Any = stored if blr_config is None else blr_config
    wanted: BLRConfig = BLRConfig(**given) if isinstance(given, dict) else given
    if stored is None and wanted.turned:
        raise ValueError("turned=True turns weights that a model has, and these are to be random: leave turned out")
    dense_config = copy.deepcopy(config)
    if stored is not None:
        del dense_config.quantization_config
        take_notice_down(dense_config)
    model_class = model_class or named_class(config)
    # only Auto classes have the public method
    build = getattr(model_class, "from_config", None) or model_class._from_config
    model = build(dense_config, **kwargs)
    layers = wanted.layers
    plan = match_plan(model, plan_from_layers(layers)) if layers else resolve_plan(model, wanted)
    swap_in(model, plan)
    record_plan(model, wanted, plan)
    return model


def class_named(config: PreTrainedConfig) -> type[Any] | None:
    """The transformers class that the config says it was saved by; None where it names none, or none of these."""
    import transformers

    names = getattr(config, "architectures", None)
    return getattr(transformers, names[0], None) if names else None


def named_class(config: PreTrainedConfig) -> type[Any]:
    """The transformers class that the config names. Raises ValueError if there is none."""
    model_class = class_named(config)
    if model_class is None:
        raise ValueError(
            f"config.architectures is {getattr(config, 'architectures', None)}, which names no class of "
            "transformers; pass model_class="
        )
    return model_class
