"""BLR models without a checkpoint: back to dense, and from a config with random factors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_blr.checkpoint.layout import match_plan, swap_in
from hf_blr.checkpoint.record import holders, record_plan, record_replaced
from hf_blr.config import BLRConfig
from hf_blr.linear import blr_modules
from hf_blr.plan import plan_from_layers, resolve_plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def to_dense(model: nn.Module) -> nn.Module:
    """Multiply all factors out: every BLR module becomes the `nn.Linear` or `Conv1D` it stands for.

    Works in place, one module at a time, and returns the model, whose config no longer mentions hf_blr. Of a part of a
    compressed model, the whole one's config is kept right too.

    Raises:
        ValueError: if the model has no BLR modules, is offloaded, or carries adapters on them.
    """
    modules = blr_modules(model)
    if not modules:
        raise ValueError(f"{type(model).__name__} has no BLR modules, there is nothing to make dense")
    adapted = [name for name in modules if name.endswith(".base_layer")]
    if adapted:
        raise ValueError(f"{adapted[0]} carries an adapter; take it off first with peft_model.unload()")
    refuse_offloaded(model)
    recorded = holders(model)
    try:
        for name, module in modules.items():
            model.set_submodule(name, module.to_dense())
    finally:
        # stopped half-way, the configs name what is left
        record_replaced(recorded)
    return model


def refuse_offloaded(model: nn.Module) -> None:
    """Raises ValueError if some weights are on disk or wait behind an offload hook."""
    away = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if away:
        raise ValueError(
            f"{away[0]} is offloaded ({len(away)} parameters are), and factors must be in memory to be "
            "multiplied out; load the model without device_map, or with one that holds all of it"
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
        ValueError: if neither or both say what to compress, or no class is given and the config names none.
    """
    stored = getattr(config, "quantization_config", None)
    if (stored is None) == (blr_config is None):
        raise ValueError(
            "from_config needs one BLRConfig, in config.quantization_config or as blr_config=, got "
            + ("both" if stored is not None else "neither")
        )
    given: Any = stored if blr_config is None else blr_config
    wanted: BLRConfig = BLRConfig(**given) if isinstance(given, dict) else given
    dense_config = copy.deepcopy(config)
    if stored is not None:
        del dense_config.quantization_config
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
