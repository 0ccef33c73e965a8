"""The module that holds one factor in bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.formats.averaged import CodeGuard
from hf_blr.formats.bits import Bits
from hf_blr.formats.codes import Codes
from hf_blr.ops import InBits


class NeverCast(nn.Module):
    """Moves with the model, and is not cast with it: its tensors mean something in their own dtypes alone."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeverCast:
        applied: Any = super()._apply(lambda tensor: fn(as_integers(tensor)).view(tensor.dtype), recurse)
        return applied


class FactorInBits(NeverCast):
    """Codes and scales of a factor; called with a dtype, it gives the factor back, and without one what kernels read.

    It is called, not only read, because packages that offload weights bring them in before a module's forward. The
    tensors are parameters that do not train, because offloading moves parameters and leaves buffers where they are.

    Args:
        storage: the format.
        shape: of the factor `[..., n, k]`.
        device: of its tensors.
    """

    weight_scale: Tensor

    def __init__(self, storage: Bits, shape: tuple[int, ...], device: torch.device | str | None = None):
        super().__init__()
        self.storage, self.shape = storage, shape
        self.guard = CodeGuard()
        for name, (size, kind) in storage.parts(shape).items():
            value = torch.empty(size, device=device, dtype=storage.dtypes[kind])
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, dtype: torch.dtype | None = None, chosen: Tensor | None = None) -> Tensor | InBits:
        """The factor `[..., n, k]` in this dtype; None: codes and scales.

        chosen: of factors of experts `[E, n, k]`, those that are wanted, in this order.
        """
        if not torch.compiler.is_compiling():
            self.look(new=False)
        parts = self.parts()
        if chosen is not None:
            own = (self.storage.code_part, "weight_scale")
            parts |= {name: parts[name].index_select(0, chosen) for name in own}
        if dtype is None:
            return self.storage.held(parts, self.shape)
        return self.storage.numbers(parts, self.shape, dtype)

    def parts(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.storage.parts(self.shape)}

    def codes(self) -> Codes:
        """The codes and scales that it holds."""
        return self.storage.codes(self.parts(), self.shape)

    def look(self, new: bool = True) -> None:
        """Raises ValueError if the codes were written to by somebody else; notes new ones, if they are to be noted."""
        self.guard.look(getattr(self, self.storage.code_part), new)

    def take(self, codes: Codes) -> None:
        """Hold these codes and scales."""
        self.guard.forget()
        for name, part in self.storage.laid_out(codes).items():
            getattr(self, name).data.copy_(part)

    def scale(self, number: float) -> None:
        """Multiply the factor by a positive number, in place; scales are rounded to their dtype."""
        self.weight_scale.data.mul_(number)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            stand_alone(destination, prefix, self.parts())

    def _load_from_state_dict(self, *args: Any) -> None:
        self.guard.forget()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        self.look()
        # plain pickles of float8 tensors cannot be read back (PyTorch 2.13); those of integers can
        integers = {name: nn.Parameter(as_integers(part), False) for name, part in self.parts().items()}
        return {**self.__dict__, "_parameters": integers, "guard": self.guard.of_copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, (_, kind) in self.storage.parts(self.shape).items():
            self._parameters[name] = nn.Parameter(getattr(self, name).view(self.storage.dtypes[kind]), False)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, storage={self.storage.name}"


def stand_alone(destination: dict[str, Any], prefix: str, held: Mapping[str, Tensor]) -> None:
    """In a state dict, tensors that are parts of others, after `hf_blr.fuse`, become copies, as files want them.

    Args:
        destination, prefix: as of `nn.Module._save_to_state_dict`.
        held: {name behind the prefix: tensor} of one module.
    """
    for name, tensor in held.items():
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            destination[prefix + name] = destination[prefix + name].clone(memory_format=torch.contiguous_format)


def as_integers(tensor: Tensor) -> Tensor:
    """A view without floating-point numbers: functions that cast those leave it alone."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)
