"""The 3-D parameters of a model that hold the matrices of its experts, each seen as a layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_blr.dense import is_dense_linear
from hf_blr.experts.conventions import holds_experts, meets_all

#: the parameters that an experts module may have; each holds one matrix an expert
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class ExpertsTensor(nn.Module):
    """One 3-D parameter of an experts module, to be read as a dense layer of E matrices.

    A bias stays with the experts module.

    Args:
        owner: the experts module.
        key: the parameter's name in there.
    """

    bias: None = None
    owner: Any
    key: str

    def __init__(self, owner: nn.Module, key: str):
        super().__init__()
        # not as a part of this module: the tensor belongs to the model
        self.__dict__.update(owner=owner, key=key)

    @property
    def weight(self) -> Tensor:
        """`[E, N, K]`, a view of the parameter."""
        stored: Tensor = self.owner.get_parameter(self.key)
        return stored.mT if self.transposed else stored

    @property
    def transposed(self) -> bool:
        """Whether the parameter is `[E, K, N]`."""
        return not holds_experts(self.owner) or bool(self.owner.is_transposed)

    @property
    def num_experts(self) -> int:
        return len(self.weight)


def tensors_of(module: nn.Module) -> dict[str, ExpertsTensor]:
    """{name in the module: its 3-D parameter}; those that are factors by now are left out."""
    if not (holds_experts(module) or meets_all(module)):
        return {}
    own = module._parameters
    return {key: ExpertsTensor(module, key) for key in PROJECTIONS if (p := own.get(key)) is not None and p.dim() == 3}


def dense_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{name: layer} of all that can be replaced, in the model's order: linear layers and tensors of experts."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if is_dense_linear(module):
            found[name] = module
        found |= {f"{name}.{key}".lstrip("."): tensor for key, tensor in tensors_of(module).items()}
    return found


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """The module of this name, or the tensor of experts.

    Raises:
        AttributeError: if there is neither.
    """
    parent, _, key = name.rpartition(".")
    if key in PROJECTIONS and (tensor := tensors_of(model.get_submodule(parent)).get(key)) is not None:
        return tensor
    return model.get_submodule(name)
