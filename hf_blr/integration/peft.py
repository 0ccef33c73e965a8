"""LoRA adapters on BLR modules."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from hf_blr.experts import ExpertsLinear
from hf_blr.integration.dora import dora_variant
from hf_blr.integration.on_import import when_imported, wrap_once
from hf_blr.integration.refit import merge_by_refit
from hf_blr.linear import BLRLinear, blr_modules

LORA_CONFIG = "peft.tuners.lora.config"
TUNERS = "peft.tuners.tuners_utils"

#: initialisations that look at nothing but the adapter; the others move a part of the base weight into it
PLAIN_INITS = (True, False, "gaussian", "eva")


def enable_peft() -> None:
    """Let every `LoraConfig` put adapters on BLR modules; done by `import hf_blr`.

    PEFT keeps its map of supported modules in the config object and does not save it, so each new config
    needs the entry, those that are read from an adapter's folder too.
    """
    when_imported(LORA_CONFIG, wrap_lora_config)
    when_imported(TUNERS, wrap_all_linear)


def wrap_lora_config(lora_config: Any) -> None:
    """Add the entry for BLR modules at the end of `LoraConfig.__post_init__`; once."""

    def with_entry(original: Callable[..., None]) -> Callable[..., None]:
        def __post_init__(self: Any) -> None:
            original(self)
            self._register_custom_module({ExpertsLinear: refuse_experts, BLRLinear: lora_class()})

        return __post_init__

    wrap_once(lora_config.LoraConfig, "__post_init__", with_entry)


def wrap_all_linear(tuners: Any) -> None:
    """Let `target_modules="all-linear"` of LoRA mean BLR layers as well as dense ones; once."""

    def with_ours(original: Callable[..., Any]) -> Callable[..., Any]:
        def include_all(peft_config: Any, model: nn.Module) -> Any:
            targets = getattr(peft_config, "target_modules", None)
            wants_all = isinstance(targets, str) and targets.lower() == tuners.INCLUDE_LINEAR_LAYERS_SHORTHAND
            peft_config = original(peft_config, model)
            # of PEFT's methods, LoRA alone knows our layers
            if wants_all and peft_config.peft_type == "LORA":
                found = {name for name in linear_names(model) if not name.endswith(".base_layer")}
                peft_config.target_modules = {*peft_config.target_modules, *found}
            return peft_config

        return include_all

    wrap_once(tuners, "_maybe_include_all_linear_layers", with_ours)


def linear_names(model: nn.Module) -> list[str]:
    """The BLR modules that stand for one linear layer each."""
    return [name for name, module in blr_modules(model).items() if not isinstance(module, ExpertsLinear)]


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the model's BLR linear layers, for `LoraConfig(target_modules=...)`; "all-linear" adds the dense ones.

    Raises:
        ValueError: if the model has none.
    """
    names = linear_names(model)
    if not names:
        raise ValueError(
            f'{type(model).__name__} has no BLR modules for adapters; target_modules="all-linear" finds dense ones'
        )
    return names


def refuse_experts(*args: Any, **kwargs: Any) -> Any:
    """Raises NotImplementedError: which expert's adapter would run, PEFT does not know."""
    raise NotImplementedError(
        "factors of experts take no LoRA adapter: use target_modules=hf_blr.lora_targets(model), and train the factors"
    )


@functools.cache
def lora_class() -> type[nn.Module]:
    """`LoraBLRLinear`, made on first use because it derives from a class of PEFT."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class LoraBLRLinear(Linear):
        """y = blr(x) + scaling * B(A(dropout(x))): PEFT's own LoRA layer around a BLR module; with DoRA on request."""

        def __init__(self, base_layer: BLRLinear, *args: Any, **kwargs: Any):
            # the adapter's output belongs before the activation
            base_layer.activation = ""
            super().__init__(base_layer, *args, **kwargs)
            # what is added to the weight is [N, K] however the replaced layer stored its own
            self.fan_in_fan_out = False

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            # PEFT's own look-up warns of every class that it does not know
            return module.in_features, module.out_features

        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            # the others work on the dense weight in each forward; PEFT refuses what is not listed here
            return {(): None, ("use_dora",): dora_variant()}

        def resolve_lora_variant(self, **settings: Any) -> Any:
            # PEFT 0.18 passes the settings one by one, and has no table
            if "config" not in settings:
                return dora_variant()() if settings.get("use_dora") else None
            return super().resolve_lora_variant(**settings)

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(super().update_layer).bind(*args, **kwargs).arguments
            # PEFT 0.18 passes the settings one by one, later releases in the config
            settings = vars(given["config"]) if "config" in given else {**given, **given.get("kwargs", {})}
            init = settings.get("init_lora_weights", True)
            if init not in PLAIN_INITS:
                raise NotImplementedError(
                    f"a BLR module has no dense weight, which init_lora_weights={init!r} may split; use one of "
                    f"{PLAIN_INITS}"
                )
            super().update_layer(*args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            merge_by_refit(self, check_adapters_to_merge(self, adapter_names))

        def unmerge(self) -> None:
            raise NotImplementedError(
                "a LoRA adapter is never merged into block low-rank factors in a way that could be undone; to use the "
                "base model alone, call disable_adapter() or unload()"
            )

    return LoraBLRLinear
