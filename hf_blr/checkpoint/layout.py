"""From the layout that a checkpoint stores to the modules of the model at hand."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from hf_blr.checkpoint.verify import describe
from hf_blr.dense import stored_weight
from hf_blr.experts import dense_layers, layer_named, put_layer
from hf_blr.linear import BLRLinear
from hf_blr.plan import Plan, check_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class ModuleNames:
    """Finds a model's module by a name that another class of the family, or another release, gave it.

    A base model's `layers.0` is `model.layers.0` in the model with a head; and transformers renames modules
    between releases and keeps the old names in the files. Of other models the names are those in the files.
    """

    def __init__(self, model: PreTrainedModel):
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        self.modules = dict(model.named_modules()) | dense_layers(model)
        self.prefix = ""
        self.renamings: list[WeightRenaming] = []
        if isinstance(model, PreTrainedModel):
            self.prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
            self.renamings = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]

    def find(self, name: str) -> str | None:
        """The model's own name for the module, None if there is no such module."""
        for candidate in (name, self.renamed(name)):
            for variant in (candidate, candidate.removeprefix(self.prefix), self.prefix + candidate):
                if variant in self.modules:
                    return variant
        return None

    def renamed(self, name: str) -> str:
        """Of a module; some patterns only fit the name of a parameter."""
        return self.renamed_key(f"{name}.weight").removesuffix(".weight")

    def renamed_key(self, key: str) -> str:
        """The name under which the loader looks for a tensor's place."""
        for renaming in self.renamings:
            key = renaming.rename_source_key(key)[0]
        return key


def match_plan(model: PreTrainedModel, plan: Plan) -> Plan:
    """The stored plan under this model's module names.

    Modules that this model does not have (a head, for a base model) are left out with a warning.

    Raises:
        ValueError: if no name fits, or a module that fits has other sizes than the plan says.
    """
    names = ModuleNames(model)
    matched: Plan = {}
    unmatched: list[str] = []
    for name, layer in plan.items():
        own = names.find(name)
        if own is None:
            unmatched.append(name)
        else:
            matched[own] = layer
    if not matched:
        raise ValueError(
            f"{unmatched[0]}: none of the {len(plan)} compressed modules that the config's layers list is in "
            f"this {type(model).__name__}; load the checkpoint with the class that saved it"
        )
    if unmatched:
        unknown = describe(f"Modules of the plan that no {type(model).__name__} has", unmatched)
        logger.warning("%sTheir factors are not loaded", unknown)
    for name, layer in matched.items():
        remedy = "load the checkpoint with the config that was saved with it"
        check_layer(name, layer_named(model, name), layer, remedy)
    return {name: matched[name] for name in names.modules if name in matched}


def swap_in(model: nn.Module, plan: Plan) -> dict[str, BLRLinear]:
    """Put a fresh BLR module in each planned place, with the old layer's device and dtype."""
    swapped = {}
    for name, layer in plan.items():
        dense = layer_named(model, name)
        weight = stored_weight(dense)
        module = layer.build(device=weight.device, dtype=weight.dtype).train(dense.training)
        if layer.experts:
            put_layer(model, name, module)
        else:
            model.set_submodule(name, module)
        swapped[name] = module
    return swapped
