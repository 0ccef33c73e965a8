"""LoRA adapters on BLR modules."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from hf_blr.experts import ExpertsLinear
from hf_blr.integration.on_import import when_imported
from hf_blr.linear import BLRLinear, blr_modules

LORA_CONFIG = "peft.tuners.lora.config"

#: initialisations that look at nothing but the adapter; the others move a part of the base weight into it
PLAIN_INITS = (True, False, "gaussian", "eva")


def enable_peft() -> None:
    """Let every `LoraConfig` put adapters on BLR modules; done by `import hf_blr`.

    PEFT keeps its map of supported modules in the config object and does not save it, so each new config
    needs the entry, those that are read from an adapter's folder too.
    """
    when_imported(LORA_CONFIG, wrap_lora_config)


def wrap_lora_config(lora_config: Any) -> None:
    """Add the entry for BLR modules at the end of `LoraConfig.__post_init__`; once."""
    original = lora_config.LoraConfig.__post_init__
    if hasattr(original, "hf_blr_wrapper"):
        return

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        self._register_custom_module({ExpertsLinear: refuse_experts, BLRLinear: lora_class()})

    wrapper: Any = __post_init__
    wrapper.hf_blr_wrapper = True
    lora_config.LoraConfig.__post_init__ = wrapper


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the model's BLR linear layers, for `LoraConfig(target_modules=...)`; "all-linear" does not see them.

    Raises:
        ValueError: if the model has none.
    """
    names = [name for name, module in blr_modules(model).items() if not isinstance(module, ExpertsLinear)]
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
    """`LoraBLR`, made on first use because it derives from a class of PEFT."""
    from peft.tuners.lora import Linear

    class LoraBLR(Linear):
        """y = blr(x) + scaling * B(A(dropout(x))): PEFT's own LoRA layer around a BLR module.

        The adapter cannot be merged: the sum of a BLR and a low-rank matrix does not fit into the factors.
        """

        def __init__(self, base_layer: BLRLinear, *args: Any, **kwargs: Any):
            # the adapter's output belongs before the activation
            base_layer.activation = ""
            super().__init__(base_layer, *args, **kwargs)

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            # PEFT's own look-up warns of every class that it does not know
            return module.in_features, module.out_features

        @property
        def lora_variants(self) -> dict[tuple[str, ...], None]:
            # the variants work on the dense weight in each forward; PEFT refuses what is not listed here
            return {(): None}

        def update_layer(self, *args: Any, **kwargs: Any) -> None:
            given = inspect.signature(super().update_layer).bind(*args, **kwargs).arguments
            # PEFT 0.18 passes the settings one by one, later releases in the config
            settings = vars(given["config"]) if "config" in given else {**given, **given.get("kwargs", {})}
            init = settings.get("init_lora_weights", True)
            if settings.get("use_dora") or init not in PLAIN_INITS:
                raise NotImplementedError(
                    "a BLR module has no dense weight, which use_dora rescales and init_lora_weights="
                    f"{init!r} may split; use plain LoRA with init_lora_weights in {PLAIN_INITS}"
                )
            super().update_layer(*args, **kwargs)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            raise NotImplementedError(
                "a LoRA adapter cannot be merged into block low-rank factors; keep it beside them, or take "
                "it off with unload(), make the model dense with hf_blr.to_dense(model), and merge it there"
            )

        def unmerge(self) -> None:
            raise NotImplementedError(
                "no LoRA adapter is ever merged into block low-rank factors; to use the base model alone, "
                "call disable_adapter() or unload()"
            )

    return LoraBLR
