"""What each replaced module becomes, in memory, as JSON and as it stands in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_blr.experts import ExpertsLinear
from hf_blr.formats import PLAIN, Format, format_named
from hf_blr.linear import BLRLinear, blr_modules
from hf_blr.structures import (
    FACTOR,
    BLRSpec,
    StoredTensor,
    is_count,
    spec_from_dict,
    structure_named,
)


@dataclass(frozen=True)
class LayerPlan:
    """What one dense layer becomes: the factors' sizes, and what else must be known to build it back.

    Raises:
        ValueError: if the format cannot store a layer of these sizes.
    """

    spec: BLRSpec
    bias: bool
    transposed: bool
    storage: Format = PLAIN
    #: E, where the layer is a tensor of that many experts; 0 for a linear layer
    experts: int = 0

    def __post_init__(self) -> None:
        problem = self.storage.misfit(self.spec) or self.storage.waste(self.spec)
        if problem is not None:
            raise ValueError(problem)
        if self.storage == PLAIN and structure_named(self.spec.structure).whole:
            raise ValueError(
                f"a layer of structure {self.spec.structure!r} is smaller in a format of fewer bits alone: name one, "
                "or leave the layer out of the plan"
            )

    @property
    def matrices(self) -> int:
        """How many matrices of the spec's sizes the layer holds: one, or one for each expert."""
        return max(self.experts, 1)

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes before those of the spec."""
        return (self.experts,) if self.experts else ()

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Of all that the layer stores in a model of this dtype, but for its bias."""
        return self.storage.num_bytes(self.spec, dtype, self.leading)

    def to_dict(self) -> dict[str, Any]:
        # the plain format goes without saying, also for a release that knows no other
        kept = {} if self.storage == PLAIN else {"format": self.storage.name, **self.storage.settings}
        many = {"experts": self.experts} if self.experts else {}
        return {**self.spec.to_dict(), "bias": self.bias, "transposed": self.transposed, **kept, **many}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerPlan:
        """The inverse of `to_dict`. Raises ValueError for missing, unknown or wrongly typed entries."""
        if not isinstance(data, dict):
            raise ValueError(f"a layer's plan is a dict, got {type(data).__name__}")
        data = dict(data)
        try:
            bias, transposed = data.pop("bias"), data.pop("transposed")
        except KeyError as error:
            raise ValueError(f"a layer's plan needs the key {error}, got {sorted(data)}") from None
        for key, value in (("bias", bias), ("transposed", transposed)):
            if not isinstance(value, bool):
                raise ValueError(f"{key} must be True or False, got {value!r}")
        experts = data.pop("experts", 0)
        if not is_count(experts) or experts < 0:
            raise ValueError(f"experts must be a number of experts, got {experts!r}")
        storage = format_named(data.pop("format", PLAIN.name), data.pop("group_size", None))
        spec = spec_from_dict(data)
        highest = min(spec.in_features, spec.out_features)
        if spec.rank > highest:
            # of a damaged file, whose layers would fill the memory
            raise ValueError(f"rank must be at most {highest}, as that of any such matrix, got {spec.rank}")
        return cls(spec, bias, transposed, storage, experts)

    def stored(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
        """{state-dict key: shape, dtype} of all that the module keeps, its bias among it; None: the model's dtype."""
        bias = {"bias": StoredTensor((self.spec.out_features,), FACTOR)} if self.bias else {}
        tensors = (self.storage.stored(self.spec, self.leading) | bias).items()
        return {key: (shape, self.storage.dtype_of(kind, None)) for key, (shape, kind) in tensors}

    def build(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> BLRLinear:
        """The module, with fresh parameters (none on the meta device)."""
        if self.experts:
            return ExpertsLinear(self.spec, self.experts, self.transposed, device, dtype, self.storage)
        return BLRLinear.from_spec(
            self.spec,
            bias=self.bias,
            transposed=self.transposed,
            device=device,
            dtype=dtype,
            storage=self.storage,
        )


Plan = dict[str, LayerPlan]


def plan_from_layers(layers: dict[str, dict]) -> Plan:
    """The plan stored in a config's `layers`. Raises ValueError that names the module."""
    plan = {}
    for name, data in layers.items():
        try:
            plan[name] = LayerPlan.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return plan


def layers_from_plan(plan: Plan) -> dict[str, dict]:
    """The JSON-ready form that `plan_from_layers` reads."""
    return {name: layer.to_dict() for name, layer in plan.items()}


def plan_in_place(model: nn.Module) -> Plan:
    """The plan of what is replaced in the model now, read off its BLR modules."""
    return {
        name: LayerPlan(
            module.spec,
            module.bias is not None,
            module.transposed,
            module.storage,
            module.num_experts if isinstance(module, ExpertsLinear) else 0,
        )
        for name, module in blr_modules(model).items()
    }
